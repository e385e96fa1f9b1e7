// Every view: theme, copying, times in the browser's zone, the keyboard's common keys, and lists that refresh.

import { documentOf, get } from "./fragment.js";
import { isPaused, onChange, toggle } from "./live.js";

const said = document.getElementById("said");
export const say = (text) => { said.textContent = text; };

const pad = (number) => String(number).padStart(2, "0");
export function localise(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (Number.isNaN(at.getTime())) continue;
    const clock = `${pad(at.getHours())}:${pad(at.getMinutes())}:${pad(at.getSeconds())}`;
    const day = `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
    time.textContent = "full" in time.dataset ? `${day} ${clock}.${String(at.getMilliseconds()).padStart(3, "0")}` : clock;
    time.title = `${day} ${clock}`;
  }
  for (const place of root.querySelectorAll("[data-origin]")) place.textContent = location.origin;
}

function turnTheme() {
  const order = ["light", "dark", null];
  let chosen = null;
  try { chosen = localStorage.getItem("sandbox-theme"); } catch { /* storage may be forbidden */ }
  const next = order[(order.indexOf(chosen) + 1) % order.length];
  try { if (next) localStorage.setItem("sandbox-theme", next); else localStorage.removeItem("sandbox-theme"); } catch { /* as above */ }
  document.documentElement.dataset.theme = next ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  say(`Theme: ${next ?? "as the system"}`);
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  const word = button.querySelector("span");
  const before = word.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent);
    word.textContent = "Copied";
  } catch {
    word.textContent = "Not allowed";
  }
  say(word.textContent);
  setTimeout(() => { word.textContent = before; }, 1200);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});

const keys = document.getElementById("keys");
for (const [id, act] of [["theme", turnTheme], ["help", () => keys.showModal()]]) {
  const button = document.getElementById(id);
  button.hidden = false;
  button.addEventListener("click", act);
}

export const isTyping = (target) => target.closest?.("input:not([type=checkbox], [type=radio]), textarea, select") !== null;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (isTyping(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const acts = {
    "/": () => document.querySelector("input[type=search]")?.select(),
    "?": () => keys.showModal(),
    p: toggle,
    t: turnTheme,
  };
  const act = acts[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// Lists of other views: fetched again after changes, unless somebody reads in them.
const list = document.querySelector("[data-refresh]");
if (list) {
  let first = true;
  let waiting = null;
  onChange(() => {
    if (first) { first = false; return; }
    waiting ??= setTimeout(async () => {
      waiting = null;
      if (isPaused() || list.querySelector("details[open]") || list.contains(document.activeElement)) return;
      try {
        const found = documentOf((await get(location.href)).text).querySelector("[data-refresh]");
        if (found) { list.replaceChildren(...found.childNodes); localise(list); }
      } catch { /* the next change tries again */ }
    }, 1500);
  });
}

localise(document);
