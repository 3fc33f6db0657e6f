// Gets the page's data: told of changes where that works, asking every few seconds where it does not.
const SECTIONS = ["head", "map", "curves", "timeline", "trust", "log"];
const POLL_MS = 3000;
const SILENT_MS = 25000; // the server gives a sign of life every 10 s
const RETRY_STREAM_MS = 30000;

export function follow(onChange) {
  const data = { now_s: 0, link: "connecting", heard_ms: 0 };
  let isDue = false, stream = null, polling = null, retryAt = 0;

  const changed = () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => { isDue = false; onChange({ ...data }); });
  };
  const heard = (now_s, link) => {
    Object.assign(data, { now_s, link, heard_ms: Date.now(), skew_ms: Date.now() - now_s * 1000 });
    changed();
  };

  async function poll() {
    try {
      const answer = await fetch("page", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      const page = await answer.json();
      for (const name of SECTIONS) data[name] = page[name];
      heard(page.now_s, "polling");
    } catch {
      data.link = "lost";
      changed();
    }
    if (stream === null && Date.now() >= retryAt) listen();
    polling = stream === null || stream.readyState !== 1 ? setTimeout(poll, POLL_MS) : null;
  }

  function fallBack() {
    if (stream !== null) { stream.close(); stream = null; }
    retryAt = Date.now() + RETRY_STREAM_MS;
    if (polling === null) poll();
  }

  function listen() {
    stream = new EventSource("live");
    stream.addEventListener("now", (event) => {
      if (polling !== null) { clearTimeout(polling); polling = null; }
      heard(Number(event.data), "live");
    });
    for (const name of SECTIONS) {
      stream.addEventListener(name, (event) => { data[name] = JSON.parse(event.data); changed(); });
    }
    stream.onerror = fallBack;
  }

  setInterval(() => {
    if (stream !== null && data.link === "live" && Date.now() - data.heard_ms > SILENT_MS) fallBack();
  }, 5000);
  if (new URLSearchParams(location.search).has("poll")) { retryAt = Infinity; poll(); } else listen();
}
