// Puts the page together: the bar on top, the whole run or one miner below, drawn anew whenever data comes.
import { html, render, useEffect, useState } from "./vendor/preact.js";
import { Figures, LossCard, RateCard } from "./curves.js";
import { follow } from "./feed.js";
import { lasting } from "./format.js";
import { LogCard } from "./log.js";
import { MinerPage } from "./miner.js";
import { PipelineCard } from "./pipeline.js";
import { TimelineCard } from "./timeline.js";
import { AgreementCard, BoardCard, StalenessCard } from "./trust.js";

const LINKS = { connecting: "Connecting", live: "Live", polling: "Asking every 3 s", lost: "Not reachable" };

function useRoute() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const moved = () => { setHash(location.hash); scrollTo(0, 0); };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const found = /^#\/miner\/([1-9A-HJ-NP-Za-km-z]{46,49})$/.exec(hash);
  return found === null ? null : found[1];
}

function ThemeSwitch() {
  const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const [dark, setDark] = useState(isDark());
  const turn = () => {
    const theme = dark ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("orion-theme", theme);
    setDark(!dark);
  };
  return html`<button type="button" class="theme" onClick=${turn} aria-label=${dark ? "Use the light theme" : "Use the dark theme"}>${dark ? "☀" : "☾"}</button>`;
}

function Bar({ data }) {
  const age_s = data.heard_ms ? (Date.now() - data.heard_ms) / 1000 : null;
  return html`<header class="bar"><a class="brand" href="#/"><img src="assets/icon.svg" alt="" width="26" height="26" />Orion</a>
    <p class="run">${data.head && html`<b>${data.head.run_id}</b><span>${data.head.model}, ${data.head.sync}</span>`}</p>
    <p class=${`link ${data.link}`} role="status" data-link=${data.link}><i></i>${LINKS[data.link]}${data.link === "lost" && age_s !== null ? `, ${lasting(age_s)} old` : ""}</p>
    <${ThemeSwitch} /></header>`;
}

function Overview({ data }) {
  const isPhone = innerWidth < 700;
  return html`<main id="main" class="page" tabindex="-1"><h1 class="hidden">Run ${data.head.run_id}</h1>
    <${Figures} head=${data.head} now_s=${data.now_s} />
    <div class="pair wide"><${PipelineCard} map=${data.map} head=${data.head} /><${LossCard} curves=${data.curves} head=${data.head} height=${isPhone ? 220 : 330} /></div>
    <${TimelineCard} timeline=${data.timeline} now_s=${data.now_s} isFinished=${data.head.finished} />
    <div class="trio"><${RateCard} curves=${data.curves} head=${data.head} height=${200} /><${AgreementCard} trust=${data.trust} head=${data.head} /><${StalenessCard} trust=${data.trust} /></div>
    <div class="pair"><${BoardCard} trust=${data.trust} /><${LogCard} log=${data.log} /></div>
    <footer><p>Read-only. The same figures: <code>orion status</code>, <a href="../v1/status">/v1/status</a>, <a href="../metrics">/metrics</a>. Anybody can check them: <code>orion audit</code>.</p></footer>
  </main>`;
}

function App({ data }) {
  const hotkey = useRoute();
  const isThere = data.head && data.map && data.curves && data.timeline && data.trust && data.log;
  useEffect(() => {
    if (data.head) document.title = `${data.head.loss === null ? "" : `${data.head.loss.toFixed(3)} · `}${data.head.run_id} · Orion`;
  });
  return html`<${Bar} data=${data} />${!isThere
    ? html`<p class="loading">${data.link === "lost" ? "The orchestrator does not answer." : "Asking the orchestrator …"}</p>`
    : hotkey === null ? html`<${Overview} data=${data} />` : html`<${MinerPage} key=${hotkey} hotkey=${hotkey} data=${data} />`}`;
}

const root = document.getElementById("app");
root.textContent = "";
follow((data) => render(html`<${App} data=${data} />`, root));
