// Replicas' agreement, staleness, and the leaderboard.
import { html } from "./vendor/preact.js";
import { Behind } from "./charts.js";
import { count, minerLink, percent, whole } from "./format.js";

export function AgreementCard({ trust, head }) {
  const steps = [...new Set(trust.agreement.map((each) => each.outer_step))].sort((a, b) => a - b).slice(-16);
  const by = new Map(trust.agreement.map((each) => [`${each.stage_index} ${each.outer_step}`, each]));
  const stages = Array.from({ length: head.num_stages }, (_, index) => index);
  return html`<section class="card" aria-labelledby="agree-title">
    <header><h2 id="agree-title">Replica consistency</h2></header>
    <p class=${`verdict ${head.anchors_equal ? "well" : "ill"}`} data-figure="Consistency">${head.anchors_equal ? "✓ All replicas have always been byte-equal" : "✕ Replicas have differed"}</p>
    ${steps.length === 0 ? html`<p class="empty">The first outer step has not been merged yet.</p>` : html`<div class="scroll"><table class="grid">
      <caption class="hidden">Replicas with the agreed anchor, by stage and outer step</caption>
      <thead><tr><th scope="col">Stage</th>${steps.map((step) => html`<th scope="col">${step}</th>`)}</tr></thead>
      <tbody>${stages.map((stage) => html`<tr><th scope="row">${stage}</th>${steps.map((step) => {
        const cell = by.get(`${stage} ${step}`);
        if (cell === undefined) return html`<td><span class="cell none"></span></td>`;
        const isEqual = cell.num_equal === cell.num_told;
        return html`<td><span class=${`cell ${isEqual ? "equal" : "differs"}`} title=${`Stage ${stage}, outer step ${step}: ${cell.num_equal} of ${cell.num_told} replicas on ${cell.digest}…`}>${isEqual ? cell.num_told : `${cell.num_equal}/${cell.num_told}`}</span></td>`;
      })}</tr>`)}</tbody></table></div>`}
    <p class="note">After each outer step every replica tells the digest of its anchor: how many told the same.</p>
    <${Behind} title="Agreed anchors" rowsMax=${600} columns=${["Stage", "Outer step", "Equal", "Told", "Digest"]} rows=${trust.agreement.map((each) => [each.stage_index, each.outer_step, each.num_equal, each.num_told, html`<code>${each.digest}…</code>`])} />
  </section>`;
}

export function StalenessCard({ trust }) {
  const longest = Math.max(1, ...trust.staleness.map((each) => each.counts.length));
  const all = Array.from({ length: longest }, (_, steps) => trust.staleness.reduce((sum, each) => sum + (each.counts[steps] ?? 0), 0));
  const last = all.reduce((found, count, index) => (count > 0 ? index : found), 0);
  const shown = all.slice(0, Math.max(4, last + 1)), total = all.reduce((sum, count) => sum + count, 0), most = Math.max(1, ...shown);
  const mean = total ? all.reduce((sum, count, steps) => sum + count * steps, 0) / total : 0;
  return html`<section class="card" aria-labelledby="stale-title">
    <header><h2 id="stale-title">Staleness</h2><p class="aside">mean ${mean.toFixed(2)} inner steps</p></header>
    ${total === 0 ? html`<p class="empty">No backward pass has been counted yet.</p>` : html`<ol class="bars" role="img" aria-label=${`Histogram of staleness: ${shown.map((count, steps) => `${steps}: ${percent(count / total)}`).join(", ")}`}>
      ${shown.map((count, steps) => html`<li><b>${count ? percent(count / total) : ""}</b><i style=${{ height: `${Math.max(count ? 2 : 0, (100 * count) / most)}%` }}></i><span>${steps}</span></li>`)}</ol>`}
    <p class="note">Inner steps that passed between a microbatch's forward and its backward, of ${count(total)} backward passes.</p>
    <${Behind} title="Backward passes by staleness" columns=${["Inner steps", ...trust.staleness.map((each) => `Stage ${each.stage_index}`)]}
      rows=${shown.map((_, steps) => [steps, ...trust.staleness.map((each) => whole(each.counts[steps]))])} />
  </section>`;
}

export function BoardCard({ trust }) {
  const best = Math.max(1e-12, ...trust.ranking.map((row) => row.share));
  return html`<section class="card board" aria-labelledby="board-title">
    <header><h2 id="board-title">Leaderboard</h2><p class="aside">score = verified work in the window</p></header>
    ${trust.ranking.length === 0 ? html`<p class="empty">No work has been credited yet.</p>` : html`<div class="scroll tall" tabindex="0" role="region" aria-label="Leaderboard"><table>
      <thead><tr><th scope="col">#</th><th scope="col" class="text">Miner</th><th scope="col">Stage</th><th scope="col" class="text">Share</th><th scope="col">Credited</th><th scope="col" class="text">Verified</th></tr></thead>
      <tbody>${trust.ranking.map((row) => html`<tr key=${row.hotkey} class=${row.failed ? "failed" : ""}>
        <td>${row.rank}</td><td class="text">${minerLink(row.hotkey)}</td><td>${row.stage_index}</td>
        <td class="text share"><i style=${{ width: `${(64 * row.share) / best}px` }}></i>${percent(row.share, 1)}</td><td>${whole(row.credited)}</td>
        <td class="text">${row.failed ? html`<span class="ill">failed a check</span>` : row.verified_step === null ? "not yet" : `step ${row.verified_step}`}${row.waits > 0 && !row.failed ? html`<span class="waits">${percent(row.waits)} waits</span>` : ""}</td></tr>`)}</tbody></table></div>`}
    ${trust.num_unranked > 0 && html`<p class="note">${trust.num_unranked} further miners.</p>`}
  </section>`;
}
