// What the server tells while the page is looked at. A hidden page listens to nothing: browsers allow few connections.

const button = document.getElementById("live");
const word = button.querySelector(".word");
const listeners = new Set();
let source = null;
let paused = false;
let latest = null;

export const isPaused = () => paused;

export function onChange(listener) {
  listeners.add(listener);
  if (latest) listener(latest);
}

function show(connected) {
  button.setAttribute("aria-pressed", String(!paused));
  button.classList.toggle("off", !paused && !connected);
  word.textContent = paused ? "Paused" : connected ? "Live" : "Reconnecting…";
}

function open() {
  if (source || paused || document.hidden) return;
  source = new EventSource("/api/stream");
  source.onopen = () => show(true);
  source.onerror = () => show(false);
  source.onmessage = (message) => {
    latest = JSON.parse(message.data);
    for (const listener of listeners) listener(latest);
  };
}

function close() {
  source?.close();
  source = null;
}

export function toggle() {
  paused = !paused;
  if (paused) close(); else open();
  show(true);
}

button.hidden = false;
button.addEventListener("click", toggle);
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
addEventListener("pagehide", close);
addEventListener("pageshow", open);
open();
