// Numbers, times and names as people read them.
import { html } from "./vendor/preact.js";

const UNITS = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

export function big(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  for (const [size, letter] of UNITS) {
    if (Math.abs(value) >= size * 0.9995) return trim(value / size, digits) + "\u2009" + letter;
  }
  return trim(value, digits) + "\u2009";
}
// The number large, its unit small beside it.
export function measured(value, unit) {
  const [number, letter] = big(value).split("\u2009");
  return html`${number}<small>\u2009${letter ?? ""}${unit}</small>`;
}
// A number before a word.
export const count = (value) => big(value).trimEnd();

const trim = (value, digits) =>
  value === 0 ? "0" : value.toLocaleString("en", { maximumSignificantDigits: digits, useGrouping: false });

export const whole = (value) => (value ?? 0).toLocaleString("en");
export const percent = (share, digits = 0) =>
  share === null || share === undefined ? "–"
    : share > 0 && share < 0.5 * 10 ** (-digits - 2) ? `<${10 ** -digits}\u2009%` : (100 * share).toFixed(digits) + "\u2009%";
export const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

export function lasting(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return seconds.toFixed(1) + "\u2009s";
  if (seconds < 120) return Math.round(seconds) + "\u2009s";
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes}\u2009min ${String(Math.round(seconds % 60)).padStart(2, "0")}\u2009s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours}\u2009h ${minutes % 60}\u2009min` : `${Math.floor(hours / 24)}\u2009d ${hours % 24}\u2009h`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
export const brief = (hotkey) => `${hotkey.slice(0, 5)}…${hotkey.slice(-4)}`;
export const minerPath = (hotkey) => `#/miner/${hotkey}`;
export const minerLink = (hotkey) => html`<a class="key" href=${minerPath(hotkey)} title=${hotkey}>${brief(hotkey)}</a>`;

const HOTKEY = /(\b5[1-9A-HJ-NP-Za-km-z]{45,48}\b)/;
// A line of the log, with hotkeys made short and led to their pages.
export const withLinks = (text) =>
  text.split(HOTKEY).map((part) => (HOTKEY.test(part) ? minerLink(part) : part));

export const PARTS = {
  wait: "waiting", train: "train", upload: "upload", reduce: "reduce", apply: "apply", finish: "last anchor", done: "done",
};
export const HEALTH = {
  good: "works", joining: "joining", suspect: "suspected", barred: "barred", gone: "gone",
};
