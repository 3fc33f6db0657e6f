// Phases of the newest outer steps, stage by stage, and when each miner had done its part of them.
import { html, useState } from "./vendor/preact.js";
import { Behind, useWidth } from "./charts.js";
import { PARTS, brief, clock, lasting, minerLink, minerPath } from "./format.js";

const STRIP = 16, BAR = 5, GAP = 2, BETWEEN = 16, LEFT = 62, AXIS = 22;

function rowsOf(timeline) {
  const stages = new Map();
  for (const row of timeline.rows) {
    if (!stages.has(row.stage_index)) stages.set(row.stage_index, { steps: [], miners: new Set() });
    const stage = stages.get(row.stage_index);
    stage.steps.push(row);
    row.miners.forEach((miner) => stage.miners.add(miner.hotkey));
  }
  return [...stages.entries()];
}

// What a miner did in a step, as [part, from, to]: from the phase's beginning until it had done its part.
function deeds(step, miner) {
  const began = Object.fromEntries(step.spans.map((span) => [span.part, span.begin_s]));
  return [["upload", miner.stored_s], ["reduce", miner.reduced_s], ["apply", miner.applied_s]]
    .filter(([part, done]) => done !== null && began[part] !== undefined)
    .map(([part, done]) => [part, Math.min(began[part], done), done]);
}

function ticks(from, to, num) {
  const span = Math.max(1e-6, to - from);
  const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400].find((size) => span / size <= num) ?? 172800;
  const first = Math.ceil(from / step) * step;
  return Array.from({ length: Math.max(0, Math.floor((to - first) / step) + 1) }, (_, index) => first + index * step);
}

export function TimelineCard({ timeline, now_s, isFinished }) {
  const [ref, width] = useWidth();
  const stages = rowsOf(timeline);
  const spans = timeline.rows.flatMap((row) => row.spans.filter((span) => span.part !== "done"));
  const last = Math.max(...spans.map((span) => span.end_s ?? 0), 0);
  const until = isFinished && last > 0 ? last : now_s;
  const trained = spans.filter((span) => span.part !== "wait");
  const from = Math.min(until - 1, ...(trained.length ? trained : spans).map((span) => span.begin_s));
  const x = (time) => LEFT + ((Math.min(Math.max(time, from), until) - from) / (until - from)) * (width - LEFT - 2);
  let y = 4;
  const groups = stages.map(([index, stage]) => {
    const miners = [...stage.miners], top = y;
    y += STRIP + 4 + miners.length * (BAR + GAP) + BETWEEN;
    return { index, stage, miners, top };
  });
  const height = y + AXIS - BETWEEN / 2;
  const slow = timeline.rows.flatMap((row) => row.miners.filter((miner) => miner.is_straggler).map((miner) => [row, miner]));
  return html`<section class="card timeline" aria-labelledby="time-title">
    <header><h2 id="time-title">Phases</h2><p class="aside">${slow.length ? html`<b class="slow">${slow.length} slow ${slow.length === 1 ? "upload" : "uploads"}</b>` : "no straggler"} in the outer steps shown</p></header>
    <div ref=${ref} class="lanes">${width > 0 && html`<svg width=${width} height=${height} role="group" aria-label="Phases by time">
      ${ticks(from, until, Math.max(2, (width - LEFT) / 110)).map((time) => html`<g class="tick" key=${time}><line x1=${x(time)} x2=${x(time)} y1="0" y2=${height - AXIS} />
        <text x=${x(time)} y=${height - 6} text-anchor="middle">${x(time) > LEFT + 20 && x(time) < width - 26 ? clock(time) : ""}</text></g>`)}
      ${groups.map(({ index, stage, miners, top }) => html`<g key=${index}>
        <text class="lane" x="0" y=${top + 12}>Stage ${index}</text>
        ${stage.steps.flatMap((step) => step.spans.filter((span) => span.part !== "done").map((span) => {
          const a = x(span.begin_s), b = x(span.end_s ?? until);
          const overlaps = span.part !== "train" && stage.steps.some((other) => other.outer_step === step.outer_step + 1 && other.spans.some((each) => each.part === "train" && each.begin_s < span.begin_s + 1e-3));
          return b - a < 0.3 ? null : html`<g class=${`span ${span.part}`} key=${`${step.outer_step}${span.part}`}>
            <title>${`Stage ${index}, outer step ${step.outer_step}: ${PARTS[span.part]}, ${lasting((span.end_s ?? until) - span.begin_s)}${span.end_s === null ? " so far" : ""}`}</title>
            <rect x=${a} y=${top + (overlaps ? STRIP / 2 : 0)} width=${Math.max(1, b - a - 1)} height=${overlaps ? STRIP / 2 : STRIP} rx="2" />
            ${!overlaps && b - a > 62 && html`<text x=${a + 6} y=${top + 11.5}>${PARTS[span.part]} ${step.outer_step}</text>`}</g>`;
        }))}
        ${miners.map((hotkey, place) => {
          const line = top + STRIP + 4 + place * (BAR + GAP);
          return html`<a key=${hotkey} href=${minerPath(hotkey)} tabindex="-1" aria-label=${`Miner ${brief(hotkey)}`}>
            <rect class="ground" x=${LEFT} y=${line} width=${width - LEFT - 2} height=${BAR} rx="1.5" />
            ${stage.steps.map((step) => {
              const miner = step.miners.find((each) => each.hotkey === hotkey);
              return miner === undefined ? null : html`<g class=${miner.is_straggler ? "straggler" : ""}>
                <title>${`${brief(hotkey)}, outer step ${step.outer_step}: ${miner.upload_s === null ? "not uploaded" : `uploaded in ${lasting(miner.upload_s)}`}${miner.is_straggler ? ", slow" : ""}`}</title>
                ${deeds(step, miner).map(([part, begin, end]) => html`<rect class=${`deed ${part}`} x=${x(begin)} y=${line} width=${Math.max(1.5, x(end) - x(begin))} height=${BAR} rx="1.5" />`)}
                ${miner.is_straggler && miner.stored_s !== null && html`<path class="flag" d=${`M${x(miner.stored_s) + 2} ${line - 1}l7 3.5l-7 3.5z`} />`}
              </g>`;
            })}</a>`;
        })}</g>`)}
    </svg>`}</div>
    <p class="note legend">${["train", "upload", "reduce", "apply", "wait"].map((part) => html`<span><span class=${`swatch ${part}`}></span>${PARTS[part]}</span>`)}
      <span class="hint">Thin bars are miners: from the phase's beginning until each was through. <span class="flagmark"></span>took more than twice as long as its stage's other replicas.</span></p>
    <${Behind} title="Uploads, slowest first" rowsMax=${600} columns=${["Outer step", "Stage", "Miner", "Upload", "Announced", "Stored", "Reduced", "Applied", ""]}
      rows=${timeline.rows.flatMap((row) => row.miners.map((miner) => [row, miner]))
        .sort(([, a], [, b]) => (b.upload_s ?? 1e9) - (a.upload_s ?? 1e9))
        .map(([row, miner]) => [row.outer_step, row.stage_index, minerLink(miner.hotkey), miner.upload_s === null ? "–" : lasting(miner.upload_s), ...[miner.announced_s, miner.stored_s, miner.reduced_s, miner.applied_s].map((time) => (time === null ? "–" : clock(time))), miner.is_straggler ? "slow" : ""])} />
  </section>`;
}
