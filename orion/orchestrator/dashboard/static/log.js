// What happened, newest first, with its reason.
import { html, useState } from "./vendor/preact.js";
import { Choice } from "./charts.js";
import { clock, withLinks } from "./format.js";

const SIGN = { info: "·", warning: "!", bad: "✕" }, WORD = { info: "news", warning: "warning", bad: "failed check" };

export function LogCard({ log, hotkey }) {
  const [which, setWhich] = useState("all");
  const lines = log.lines.filter((line) => (which === "all" || line.level !== "info") && (hotkey === undefined || line.text.includes(hotkey)));
  return html`<section class="card log" aria-labelledby="log-title">
    <header><h2 id="log-title">Events</h2><${Choice} label="Which events" value=${which} options=${[["all", "All"], ["warnings", "Warnings"]]} onChoose=${setWhich} /></header>
    ${lines.length === 0 ? html`<p class="empty">Nothing to tell.</p>` : html`<div class="scroll tall" tabindex="0" role="region" aria-label="Events"><ol>
      ${[...lines].reverse().map((line) => html`<li key=${line.number} class=${line.level}><time datetime=${new Date(line.time_s * 1000).toISOString()}>${clock(line.time_s)}</time><span class="level" role="img" aria-label=${WORD[line.level]}>${SIGN[line.level]}</span><span>${withLinks(line.text)}</span></li>`)}</ol></div>`}
    <p class="note">${log.num_lines > log.lines.length ? `The newest ${log.lines.length} of ${log.num_lines}.` : `${log.num_lines} in all.`}</p>
  </section>`;
}
