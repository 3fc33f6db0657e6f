// The pipeline as a map: stages × replicas, coloured by health, with what lately flowed between them.
import { html } from "./vendor/preact.js";
import { Behind, useWidth } from "./charts.js";
import { HEALTH, PARTS, big, brief, count, minerLink, minerPath, percent, whole } from "./format.js";

const PER_ROW_MAX = 12; // more replicas than this stand in further rows of their stage
const NARROW_PX = 620;

// Where every miner stands. Wide: stages from left to right; narrow: from top to bottom.
function layout(stages, width) {
  const isNarrow = width < NARROW_PX;
  const most = Math.max(1, ...stages.map((stage) => stage.miners.length));
  const lanes = Math.ceil(most / PER_ROW_MAX), across = Math.min(most, PER_ROW_MAX);
  const places = new Map(), heads = [];
  if (isNarrow) {
    const pitch = Math.min(64, (width - 12) / across), radius = Math.max(5, Math.min(17, pitch * 0.36));
    const step = 40 + lanes * (radius * 2 + 14) + 16;
    stages.forEach((stage, index) => {
      const top = index * step;
      heads.push({ stage, x: 2, y: top + 16, anchor: "start" });
      stage.miners.forEach((miner, place) => {
        const row = Math.floor(place / across), inRow = Math.min(across, stage.miners.length - row * across);
        const x = width / 2 + ((place % across) - (inRow - 1) / 2) * pitch;
        places.set(miner.hotkey, { x, y: top + 40 + radius + row * (radius * 2 + 14), radius, miner, stage });
      });
    });
    return { isNarrow, places, heads, height: stages.length * step };
  }
  const column = width / stages.length;
  const radius = Math.max(6, Math.min(20, column / (2.6 * lanes + 1)));
  const pitch = Math.max(radius * 2 + 8, Math.min(66, 330 / across));
  const body = Math.max(across * pitch, 150);
  stages.forEach((stage, index) => {
    const middle = column * (index + 0.5);
    heads.push({ stage, x: middle, y: 18, anchor: "middle" });
    const num = Math.ceil(stage.miners.length / PER_ROW_MAX);
    stage.miners.forEach((miner, place) => {
      const lane = Math.floor(place / across), inLane = Math.min(across, stage.miners.length - lane * across);
      const x = middle + (lane - (num - 1) / 2) * (radius * 2 + 8);
      const y = 66 + body / 2 + ((place % across) - (inLane - 1) / 2) * pitch;
      places.set(miner.hotkey, { x, y, radius, miner, stage });
    });
  });
  return { isNarrow, places, heads, height: 66 + body + 8 };
}

function curve(from, to, isNarrow) {
  if (isNarrow) {
    const a = from.y + from.radius, b = to.y - to.radius, bend = (b - a) * 0.5;
    return `M${from.x} ${a}C${from.x} ${a + bend} ${to.x} ${b - bend} ${to.x} ${b}`;
  }
  const a = from.x + from.radius, b = to.x - to.radius, bend = (b - a) * 0.45;
  return `M${a} ${from.y}C${a + bend} ${from.y} ${b - bend} ${to.y} ${b} ${to.y}`;
}

function Miner({ place }) {
  const { x, y, radius, miner, stage } = place;
  const around = 2 * Math.PI * radius, busy = miner.busy ?? 0;
  const says = `Miner ${brief(miner.hotkey)}, stage ${stage.stage_index}: ${HEALTH[miner.health]}, ${miner.why}` +
    (miner.busy === null ? "" : `, busy ${percent(miner.busy)}, ${miner.in_flight} in flight`);
  const sign = { suspect: "!", barred: "×", gone: "–", joining: "+" }[miner.health];
  return html`<a href=${minerPath(miner.hotkey)} class=${`miner ${miner.health}`} aria-label=${says} data-hotkey=${miner.hotkey}>
    <title>${says}</title>
    <circle class="halo" cx=${x} cy=${y} r=${radius + 5} />
    <circle class="disc" cx=${x} cy=${y} r=${radius} />
    <circle class="busy" cx=${x} cy=${y} r=${radius} stroke-dasharray=${`${around * busy} ${around}`} transform=${`rotate(-90 ${x} ${y})`} />
    ${radius >= 9 && html`<text x=${x} y=${y} class="sign">${sign ?? (radius >= 14 ? miner.in_flight ?? "" : "")}</text>`}
  </a>`;
}

export function PipelineCard({ map, head }) {
  const [ref, width] = useWidth();
  const { isNarrow, places, heads, height } = layout(map.stages, Math.max(width, 280));
  const edges = map.edges.filter((edge) => places.has(edge.source) && places.has(edge.target));
  const most = Math.max(1e-9, ...edges.map((edge) => edge.share));
  const flows = map.microbatches_per_s > 0 && !head.finished;
  const hidden = map.stages.reduce((sum, stage) => sum + stage.num_hidden, 0);
  const present = new Set(map.stages.flatMap((stage) => stage.miners.map((miner) => miner.health)));
  return html`<section class="card pipeline" aria-labelledby="map-title">
    <header><h2 id="map-title">Pipeline</h2>
      <p class="aside">${head.num_stages} stages × ${head.replicas} replicas · ${count(head.num_params)} parameters · <span data-figure="Flow">${count(map.microbatches_per_s)} microbatches/s</span></p></header>
    <div class="map" ref=${ref}>${width > 0 && html`<svg width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} role="group" aria-label="Map of the pipeline">
      ${edges.map((edge) => {
        const path = curve(places.get(edge.source), places.get(edge.target), isNarrow), share = edge.share / most;
        return html`<path key=${edge.source + edge.target} class="edge" d=${path} stroke-width=${1 + 2.5 * share} stroke-opacity=${0.12 + 0.3 * share} />
          ${flows && share > 0.12 && html`<path key=${edge.source + edge.target + "f"} class="flow" d=${path} stroke-opacity=${0.35 + 0.65 * share} />`}`;
      })}
      ${heads.map(({ stage, x, y, anchor }) => html`<g class="stage" key=${stage.stage_index}>
        <text x=${x} y=${y} text-anchor=${anchor} class="name">Stage ${stage.stage_index}</text>
        ${isNarrow
          ? html`<text x=${x + 58} y=${y} text-anchor="start" class=${`part ${stage.part}`}>${PARTS[stage.part]} · ${stage.outer_step}</text><text x=${width - 2} y=${y} text-anchor="end" class="blocks">blocks ${stage.blocks}</text>`
          : html`<text x=${x} y=${y + 17} text-anchor=${anchor} class="blocks">blocks ${stage.blocks}</text>
            <text x=${x} y=${y + 34} text-anchor=${anchor} class=${`part ${stage.part}`}>${PARTS[stage.part]} · ${stage.outer_step}</text>`}
      </g>`)}
      ${[...places.values()].map((place) => html`<${Miner} key=${place.miner.hotkey} place=${place} />`)}
    </svg>`}</div>
    <p class="note legend"><span><span class="dot good"></span>works, ring = device busy, number = in flight</span>
      ${["joining", "suspect", "barred", "gone"].filter((kind) => present.has(kind)).map((kind) => html`<span><span class=${`dot ${kind}`}></span>${HEALTH[kind]}</span>`)}
      ${map.num_paths > 0 && html`<span><span class="mark flowing"></span>ways of the last ${map.num_paths} microbatches</span>`}
      ${hidden > 0 && html`<span>${hidden} further miners are not drawn</span>`}</p>
    <${Behind} title="Miners by stage" rowsMax=${600} columns=${["Stage", "Miner", "State", "Device", "Busy", "Tokens/s", "FLOP/s", "In flight", "Applied", "Credited", "Staleness", "Why"]}
      rows=${map.stages.flatMap((stage) => stage.miners.map((miner) => [stage.stage_index, minerLink(miner.hotkey), HEALTH[miner.health], miner.device, percent(miner.busy), big(miner.tokens_per_s), big(miner.flops_per_s), miner.in_flight ?? "–", miner.applied ?? "–", whole(miner.credited), miner.staleness_max ?? "–", miner.why]))} />
  </section>`;
}
