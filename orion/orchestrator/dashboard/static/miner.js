// One miner: what it does now, and why it is paid what it is.
import { html, useEffect, useState } from "./vendor/preact.js";
import { HEALTH, big, fixed, lasting, minerLink, percent, whole } from "./format.js";
import { LogCard } from "./log.js";

const ASK_MS = 5000;

function usePay(hotkey) {
  const [pay, setPay] = useState({ state: "asking" });
  useEffect(() => {
    let isOver = false, timer = null;
    const ask = async () => {
      try {
        const answer = await fetch(`../v1/miners/${encodeURIComponent(hotkey)}`, { cache: "no-store" });
        const body = await answer.json();
        if (!isOver) setPay(answer.ok ? { state: "there", pay: body } : { state: "refused", why: body.message });
      } catch {
        if (!isOver) setPay((before) => (before.state === "there" ? before : { state: "refused", why: "the orchestrator does not answer" }));
      }
      if (!isOver) timer = setTimeout(ask, ASK_MS);
    };
    setPay({ state: "asking" });
    ask();
    return () => { isOver = true; clearTimeout(timer); };
  }, [hotkey]);
  return pay;
}

const factor = (done, asked) => (asked ? 0.5 + (0.5 * done) / asked : 1);

function Why({ pay }) {
  const verified = pay.counted_flops - pay.waiting_flops;
  const given = pay.scores.length ? Math.max(...pay.scores.map((score) => score.weight)) : null;
  return html`<section class="card why" aria-labelledby="why-title"><header><h2 id="why-title">Why it is paid what it is</h2></header>
    <p class="score"><b data-figure="Score">${big(pay.score, 4)}</b><span>score, in FLOPs of verified work${given === null ? "" : `; chain weight up to ${percent(given, 1)}`}</span></p>
    ${pay.paid_again_from !== null
      ? html`<p class="verdict ill">✕ A failed check stands: nothing is paid before outer step ${pay.paid_again_from}.</p>`
      : html`<p class=${`verdict ${pay.verified_outer_step === null ? "" : "well"}`}>${pay.verified_outer_step === null ? "No replay of a whole outer step has passed yet: all work waits." : `✓ Verified by a replay of the whole of outer step ${pay.verified_outer_step}.`}</p>`}
    <dl class="sum">
      <div><dt>Work that counts</dt><dd>${big(pay.counted_flops, 4)}FLOPs</dd><dd class="under">outer steps ${pay.window_start} to ${pay.outer_step}: agreed by both ends, covered by a commitment, weighed by its part in the merge</dd></div>
      <div><dt>of it verified</dt><dd>${big(verified, 4)}FLOPs</dd><dd class="under">${pay.paid_again_from === null ? "counts in full" : "would count in full"}</dd></div>
      <div><dt>of it waiting</dt><dd>${big(pay.waiting_flops, 4)}FLOPs</dd><dd class="under">${pay.paid_again_from === null ? "counts" : "would count"} × ${pay.unverified_factor} until it is verified</dd></div>
    </dl>
    <div class="scroll" tabindex="0" role="region" aria-label="Pay by outer step"><table>
      <thead><tr>${["Step", "Stage", "Credited", "Committed", "Receipts", "One-sided", "In the mean", "Reduced", "× merge", "Counts"].map((name) => html`<th scope="col">${name}</th>`)}<th scope="col" class="text">Checks</th></tr></thead>
      <tbody>${[...pay.steps].reverse().map((step) => html`<tr key=${step.outer_step} class=${step.failed ? "failed" : ""}>
        <td>${step.outer_step}</td><td>${step.stage_index ?? "–"}</td><td>${whole(step.num_credited)}</td><td>${whole(step.num_committed)}</td><td>${whole(step.num_receipts)}</td><td>${whole(step.num_receipts - step.num_matched)}</td>
        <td>${step.merge === null ? "…" : `${step.merge.num_merged}/${step.merge.num_settled}`}</td><td>${step.merge === null ? "…" : `${step.merge.num_agreed}/${step.merge.num_asked}`}</td>
        <td>${step.merge === null ? "…" : fixed(factor(step.merge.num_merged, step.merge.num_settled) * factor(step.merge.num_agreed, step.merge.num_asked), 2)}</td><td>${big(step.counted_flops)}</td>
        <td class="text checks">${step.verdicts.map(({ verdict }) => html`<span class=${verdict.passed ? "well" : "ill"}>${verdict.passed ? "✓" : "✕"} ${verdict.subject}, ${verdict.num_operations} operations${verdict.passed ? "" : `: ${verdict.reason}`}</span>`)}
          ${step.waiting && html`<span class="waits">waits for verification</span>`}${step.num_contradictions > 0 && html`<span class="ill">✕ ${step.num_contradictions} contradicting receipts</span>`}</td></tr>`)}</tbody></table></div>
    <p class="note">Credited: backward passes that both ends agree on. Committed: covered by its log's commitment. One-sided receipts earn nothing. A pseudo-gradient that is in no mean, or reductions that do not stand, halve the pay each.</p>
    ${pay.scores.length > 0 && html`<h3>Said by validators</h3><table><thead><tr><th scope="col" class="text">Validator</th><th scope="col">Outer step</th><th scope="col">Score</th><th scope="col">Chain weight</th><th scope="col">Ledger entry</th></tr></thead>
      <tbody>${pay.scores.map((score) => html`<tr><td class="text">${minerLink(score.validator)}</td><td>${score.outer_step}</td><td>${big(score.score, 4)}</td><td>${percent(score.weight, 2)}</td><td>${whole(score.sequence)}</td></tr>`)}</tbody></table>`}
  </section>`;
}

function Now({ stage, miner, timeline }) {
  const rate = (value) => (value === null ? "–" : `${big(value)}B/s`);
  const uploads = timeline.rows.flatMap((row) => row.miners.filter((each) => each.hotkey === miner.hotkey).map((each) => [row.outer_step, each]));
  const cells = [
    ["Stage", `${stage.stage_index}`, `blocks ${stage.blocks}`],
    ["Device", miner.device, miner.mfu === null ? "its peak is not known" : `MFU ${percent(miner.mfu, 1)}`],
    ["Busy", percent(miner.busy), miner.flops_per_s === null ? "" : `${big(miner.flops_per_s)}FLOP/s`],
    ["Tokens", `${big(miner.tokens_per_s)}/s`, `${miner.applied ?? "–"} microbatches applied since it started`],
    ["In flight", `${miner.in_flight ?? "–"}`, `${miner.queued ?? "–"} queued, staleness ${miner.staleness_max ?? "–"} at most`],
    ["Links", rate(miner.upload_bytes_per_s), `up; down ${rate(miner.download_bytes_per_s)}`],
    ["Anchor", miner.is_equal === null ? "–" : miner.is_equal ? "✓ equal" : "✕ differs", stage.digest === null ? "" : `${stage.digest}…`],
    ["Uploads", uploads.length ? uploads.map(([, each]) => (each.upload_s === null ? "–" : lasting(each.upload_s))).join(", ") : "–", uploads.some(([, each]) => each.is_straggler) ? "slower than its stage's others" : "newest outer steps"],
  ];
  return html`<section class="figures small" aria-label="What it does now"><dl>${cells.map(([name, value, note]) => html`<div><dt>${name}</dt><dd>${value}</dd><dd class="under">${note}</dd></div>`)}</dl></section>`;
}

export function MinerPage({ hotkey, data }) {
  const answer = usePay(hotkey);
  const found = data.map.stages.flatMap((stage) => stage.miners.map((miner) => [stage, miner])).find(([, miner]) => miner.hotkey === hotkey);
  return html`<main id="main" class="page" tabindex="-1">
    <nav aria-label="Back"><a href="#/">← The whole run</a></nav>
    <div class="title"><h1><code>${hotkey}</code></h1>${found && html`<p><span class=${`dot ${found[1].health}`}></span>${HEALTH[found[1].health]}: ${found[1].why}</p>`}</div>
    ${found && html`<${Now} stage=${found[0]} miner=${found[1]} timeline=${data.timeline} />`}
    ${answer.state === "there" ? html`<${Why} pay=${answer.pay} />` : html`<p class="empty" role="status">${answer.state === "asking" ? "Asking the ledger …" : `No pay to show: ${answer.why}`}</p>`}
    <${LogCard} log=${data.log} hotkey=${hotkey} />
  </main>`;
}
