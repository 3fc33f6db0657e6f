// Line charts: uPlot on a canvas, in the page's colours, with the same numbers as a table behind.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";

export const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function useTheme() {
  const [count, setCount] = useState(0);
  useEffect(() => {
    const again = () => setCount((before) => before + 1);
    const system = matchMedia("(prefers-color-scheme: dark)");
    const watcher = new MutationObserver(again);
    system.addEventListener("change", again);
    watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    return () => { system.removeEventListener("change", again); watcher.disconnect(); };
  }, []);
  return count;
}

export function useWidth() {
  const ref = useRef(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    watcher.observe(ref.current);
    return () => watcher.disconnect();
  }, []);
  return [ref, width];
}

// lines: [{label, color (a CSS variable), values, format, scale, fill, width, isBand}], all of the length of `x`.
export function LineChart({ x, xFormat, lines, height, label, yFormat, rightFormat, yRange }) {
  const [ref, width] = useWidth();
  const theme = useTheme();
  const chart = useRef(null);
  const data = [x, ...lines.map((line) => line.values)];
  const shape = lines.map((line) => line.label).join() + label;
  const formats = useRef({});
  formats.current = { xFormat, yFormat, rightFormat };

  useEffect(() => {
    if (width === 0) return undefined;
    const font = `11px ${ink("--font")}`;
    const axis = (more) => ({
      stroke: ink("--muted"), font, ticks: { show: false }, grid: { stroke: ink("--line"), width: 1 }, ...more,
    });
    const options = {
      width, height, legend: { show: false }, padding: [12, 8, 0, 0],
      cursor: { y: false, points: { size: 7 }, drag: { setScale: false } },
      scales: { x: { time: false }, y: { range: yRange ?? undefined }, share: { range: [0, 1.02] } },
      axes: [
        axis({ grid: { show: false }, space: 80, values: (_, ticks) => ticks.map((tick) => formats.current.xFormat(tick)) }),
        axis({ size: 52, space: 40, values: (_, ticks) => ticks.map((tick) => formats.current.yFormat(tick)) }),
        ...(rightFormat
          ? [axis({ side: 1, scale: "share", size: 44, grid: { show: false }, splits: () => [0, 0.5, 1], values: (_, ticks) => ticks.map((tick) => formats.current.rightFormat(tick)) })]
          : []),
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.label, scale: line.scale ?? "y", width: line.width ?? 2, stroke: ink(line.color),
        fill: line.fill ? ink(line.fill) : undefined, points: { show: x.length < 3 }, spanGaps: true,
        dash: line.dash,
      }))],
      bands: lines.some((line) => line.isBand) ? [{ series: [lines.length, lines.length - 1], fill: ink("--band") }] : [],
      hooks: { setCursor: [(self) => tell(self)] },
    };
    const note = ref.current.parentElement.querySelector(".reading");
    const tell = (self) => {
      const place = self.cursor.idx;
      note.textContent = place === null || place === undefined ? "" : [
        formats.current.xFormat(self.data[0][place]),
        ...options.series.slice(1).flatMap((series, index) => {
          const line = lines[index], value = self.data[index + 1][place];
          return line.isBand || value === null || value === undefined ? [] : [`${series.label} ${line.format(value)}`];
        }),
      ].join("  ·  ");
    };
    chart.current = new uPlot(options, data, ref.current);
    return () => { chart.current.destroy(); chart.current = null; };
  }, [width, theme, shape, height]);

  useEffect(() => { if (chart.current !== null) chart.current.setData(data); });
  return html`<div class="chart">
    <p class="reading" aria-hidden="true"></p>
    <div class="canvas" ref=${ref} role="img" aria-label=${label} style=${{ height: `${height}px` }}></div>
  </div>`;
}

// The table behind a chart. Long ones are thinned out, and say so.
export function Behind({ title, columns, rows, rowsMax = 60 }) {
  const [isOpen, setOpen] = useState(false);
  const every = Math.max(1, Math.ceil(rows.length / rowsMax));
  const shown = isOpen ? rows.filter((_, index) => index % every === 0 || index === rows.length - 1) : [];
  return html`<details class="behind" onToggle=${(event) => setOpen(event.target.open)}>
    <summary>As a table</summary>
    ${isOpen && html`<div class="scroll" tabindex="0" role="region" aria-label=${title}><table>
      <caption>${title}${every > 1 ? `; every ${every}th row of ${rows.length}` : ""}</caption>
      <thead><tr>${columns.map((column) => html`<th scope="col">${column}</th>`)}</tr></thead>
      <tbody>${shown.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
    </table></div>`}
  </details>`;
}

export function Choice({ label, value, options, onChoose }) {
  return html`<div class="choice" role="group" aria-label=${label}>${options.map(([key, text]) => html`
    <button type="button" aria-pressed=${key === value ? "true" : "false"} onClick=${() => onChoose(key)}>${text}</button>`)}
  </div>`;
}
