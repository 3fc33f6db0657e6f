// Loss by tokens or steps; throughput and utilisation by time.
import { html, useState } from "./vendor/preact.js";
import { Behind, Choice, LineChart } from "./charts.js";
import { big, clock, count, fixed, lasting, measured, percent } from "./format.js";

export function LossCard({ curves, head, height }) {
  const [by, setBy] = useState("tokens");
  const x = by === "tokens" ? curves.tokens : curves.steps;
  const low = curves.loss.map((loss, index) => loss - curves.deviation[index]);
  const high = curves.loss.map((loss, index) => loss + curves.deviation[index]);
  const hasBand = curves.bin_size > 1;
  const band = hasBand
    ? [{ label: "low", color: "--clear", values: low, isBand: true, width: 0 }, { label: "high", color: "--clear", values: high, isBand: true, width: 0 }]
    : [];
  const format = by === "tokens" ? (value) => big(value) : (value) => `${+value.toFixed(1)}`;
  return html`<section class="card" aria-labelledby="loss-title">
    <header><h2 id="loss-title">Loss</h2>
      <${Choice} label="Horizontal axis" value=${by} options=${[["tokens", "by tokens"], ["steps", "by steps"]]} onChoose=${setBy} />
    </header>
    ${x.length === 0 ? html`<p class="empty" style=${{ height: `${height}px` }}>No microbatch has been applied yet.</p>` : html`
      <${LineChart} x=${x} height=${height} xFormat=${format} yFormat=${(value) => `${+value.toFixed(3)}`}
        label=${`Loss, now ${fixed(head.loss)}, by ${by === "tokens" ? "tokens" : "inner steps"}`}
        lines=${[{ label: "loss", color: "--train", values: curves.loss, format: (value) => value.toFixed(4) }, ...band]} />`}
    <p class="note">${curves.bin_size > 1 ? `Each point is the mean of ${curves.bin_size} microbatches; the band is one standard deviation.` : "Each point is one microbatch."}
      ${` ${head.inner_steps} inner steps make an outer step.`}</p>
    <${Behind} title="Loss" columns=${["Tokens", "Inner steps", "Outer step", "Loss", "Deviation"]}
      rows=${curves.loss.map((loss, index) => [big(curves.tokens[index]), curves.steps[index], Math.floor((curves.steps[index] - 1e-6) / head.inner_steps), loss.toFixed(4), hasBand ? curves.deviation[index].toFixed(4) : "–"])} />
  </section>`;
}

export function RateCard({ curves, head, height }) {
  const [what, setWhat] = useState("tokens");
  const values = what === "tokens" ? curves.tokens_per_s : curves.flops_per_s;
  const unit = what === "tokens" ? "tok/s" : "FLOP/s";
  const format = (value) => big(value) + unit;
  const known = head.mfu === null
    ? `The peak of no active device is known: no MFU can be given.`
    : `MFU ${percent(head.mfu, 1)} over the ${head.num_peaks} of ${head.num_active} active devices whose peak is known.`;
  return html`<section class="card" aria-labelledby="rate-title">
    <header><h2 id="rate-title">Throughput and utilisation</h2>
      <${Choice} label="Throughput in" value=${what} options=${[["tokens", "Tokens"], ["flops", "FLOPs"]]} onChoose=${setWhat} />
    </header>
    ${values.length === 0 ? html`<p class="empty" style=${{ height: `${height}px` }}>Nothing yet.</p>` : html`
      <${LineChart} x=${curves.times_s} height=${height} xFormat=${(value) => clock(value).slice(0, 8)} yFormat=${(value) => big(value)} rightFormat=${(value) => percent(value)}
        yRange=${(_, low, high) => [0, high > 0 ? high * 1.08 : 1]}
        label=${`Throughput, now ${format(what === "tokens" ? head.tokens_per_s : head.flops_per_s)}`}
        lines=${[
          { label: "throughput", color: "--train", fill: "--band", values, format },
          { label: "devices busy", color: "--upload", values: curves.busy, scale: "share", format: (value) => percent(value), width: 1.5, dash: [4, 3] },
        ]} />`}
    <p class="note"><span class="mark solid"></span>${unit} of applied microbatches <span class="mark dashed"></span>share of the time devices computed. ${known}</p>
    <${Behind} title="Throughput and utilisation" columns=${["Time", "Tokens/s", "FLOP/s", "Devices busy"]}
      rows=${curves.times_s.map((time, index) => [clock(time), big(curves.tokens_per_s[index]), big(curves.flops_per_s[index]), percent(curves.busy[index])])} />
  </section>`;
}

export function Figures({ head, now_s }) {
  const cells = [
    ["Loss", fixed(head.loss), `outer step ${head.outer_step} of ${head.outer_steps}`],
    ["Throughput", measured(head.tokens_per_s, "tok/s"), `${count(head.tokens)} tokens so far`],
    ["Compute", measured(head.flops_per_s, "FLOP/s"), head.mfu === null ? "device peaks unknown: no MFU" : `MFU ${percent(head.mfu, 1)} of ${head.num_peaks} devices`],
    ["Devices busy", percent(head.busy), `${head.num_active} of ${head.num_stages * head.replicas} miners active`],
    ["In flight",  html`${head.in_flight}<small> microbatches</small>`, `${count(head.applied)} applied, ${count(head.cancelled)} cancelled, ${count(head.rerouted + head.spliced + head.released)} repaired`],
    ["Checks", html`${head.num_checks}`, head.num_failed ? `${head.num_failed} failed` : "none failed", head.num_failed > 0],
  ];
  return html`<section class="figures" aria-label="The run in figures">
    <dl>${cells.map(([name, value, note, isBad]) => html`<div class=${isBad ? "bad" : ""}><dt>${name}</dt><dd data-figure=${name}>${value}</dd><dd class="under">${note}</dd></div>`)}</dl>
    <div class="progress" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(100 * head.fraction)}>
      <i style=${{ width: `${100 * head.fraction}%` }}></i></div>
    <p class="along"><span>${percent(head.fraction)} of the run</span>
      <span>${head.finished ? `finished${head.finish_reason ? `: ${head.finish_reason}` : ""}` : head.started_s === null ? "waits for its miners" : `${lasting(Math.max(0, now_s - head.started_s))} so far${head.remaining_s === null ? "" : `, about ${lasting(head.remaining_s)} left`}`}</span></p>
  </section>`;
}
