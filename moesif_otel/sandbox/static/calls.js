// The list of calls: filters in the address bar, new calls as they come, one call beside it, the keyboard.

import { isTyping, localise, say } from "./app.js";
import { elements, get } from "./fragment.js";
import { isPaused, onChange } from "./live.js";

const MOST_ROWS = 200; // that stay on a page while new ones enter
const form = document.getElementById("filters");
const panel = document.getElementById("detail");
const more = form.querySelector("button.more");
const rest = document.getElementById("more-filters");
const names = ["q", "status", "verb", "direction", "user", "company", "application_id", "route", "trace", "marks", "errors"];
let listRequest = null;
let callRequest = null;

const list = () => document.getElementById("list");

const narrow = matchMedia("(max-width: 900px)");
function cover() { // on a narrow screen the call lies over everything else, which cannot be reached then
  const covered = narrow.matches && !panel.hidden;
  for (const part of [document.querySelector(".top"), form, list(), document.getElementById("overview")]) part.inert = covered;
}
narrow.addEventListener("change", cover);

const parameters = () => new URLSearchParams(location.search);
const body = () => document.getElementById("rows");

function filtersOnly() {
  const found = new URLSearchParams();
  for (const [name, value] of parameters()) if (names.includes(name) && value) found.append(name, value);
  return found;
}

const withQuery = (path, query) => (query.toString() ? `${path}?${query}` : path);

// The address bar is the state: everything below shows what it says.

function go(query, { replace = false } = {}) {
  const kept = parameters().get("window");
  if (kept && !query.has("window")) query.set("window", kept);
  if (query.get("window") === "5m") query.delete("window");
  const before = filtersOnly().toString() + (parameters().get("before") ?? "") + (kept ?? "");
  history[replace ? "replaceState" : "pushState"](null, "", withQuery("/", query));
  follow(before);
}

function follow(before) {
  const now = filtersOnly().toString() + (parameters().get("before") ?? "") + (parameters().get("window") ?? "");
  if (before !== now) {
    fillForm();
    loadList();
    loadOverview();
  }
  showCall();
}

addEventListener("popstate", () => follow(null));

function fillForm() {
  const query = parameters();
  const statuses = query.getAll("status").join(",").split(",");
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.name === "status") field.checked = statuses.includes(field.value);
    else if (field.type === "checkbox") field.checked = query.get(field.name) === field.value;
    else if (field !== document.activeElement) field.value = query.get(field.name) ?? "";
  }
  form.querySelector(".reset").hidden = !filtersOnly().toString();
}

function readForm() {
  const query = new URLSearchParams();
  const statuses = [];
  for (const field of form.elements) {
    if (!field.name || (field.type === "checkbox" && !field.checked)) continue;
    if (field.name === "status") statuses.push(field.value);
    else if (field.value.trim()) query.set(field.name, field.value.trim());
  }
  if (statuses.length) query.set("status", statuses.join(","));
  for (const name of ["route", "trace", "marks"]) {
    const value = parameters().get(name);
    if (value) query.set(name, value);
  }
  return query;
}

let typing = null;
form.addEventListener("input", (event) => {
  clearTimeout(typing);
  const isText = event.target.matches("[type=search], [type=text]");
  typing = setTimeout(() => go(readForm(), { replace: isText }), isText ? 250 : 0);
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  go(readForm());
});
more.hidden = false;
rest.classList.add("closed");
more.addEventListener("click", () => {
  more.setAttribute("aria-expanded", String(!rest.classList.toggle("closed")));
});

// The list

async function loadList() {
  listRequest?.abort();
  const request = (listRequest = new AbortController());
  const query = parameters();
  try {
    const { text } = await get(withQuery("/fragments/calls", query), request.signal);
    if (request !== listRequest) return;
    const fresh = elements(text);
    localise(fresh);
    list().replaceWith(fresh);
    cover();
    const top = list().offsetTop - form.offsetHeight - document.querySelector(".top").offsetHeight;
    if (scrollY > top + 40) scrollTo({ top: Math.max(top, 0) }); // another list is read from its beginning
    say(`${document.querySelector(".paging .total")?.textContent ?? "No call fits"}`);
  } catch (error) {
    if (error.name !== "AbortError") say("The list could not be loaded");
    return;
  } finally {
    if (request === listRequest) listRequest = null;
  }
  if (known > Number(list().dataset.last)) enter(); // what came meanwhile was not looked at
}

let overviewRequest = null;
async function loadOverview({ polite = false } = {}) {
  overviewRequest?.abort();
  const request = (overviewRequest = new AbortController());
  const query = filtersOnly();
  const kept = parameters().get("window");
  if (kept) query.set("window", kept);
  try {
    const { text } = await get(withQuery("/fragments/overview", query), request.signal);
    const old = document.getElementById("overview");
    const picked = old.querySelector(".pick input:checked")?.id;
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    if (polite && focused?.matches("a")) return; // somebody is choosing here
    const fresh = elements(text);
    if (picked) fresh.getElementById(picked).checked = true;
    old.replaceWith(fresh);
    cover();
    if (focused?.dataset.window) document.querySelector(`#overview a[data-window="${focused.dataset.window}"]`)?.focus();
    else if (focused?.id) document.getElementById(focused.id)?.focus();
  } catch { /* the next change tries again */ }
}

// New calls enter at the top as long as nobody reads further down, has a call open or marks text; else they are counted.

const isReading = () => scrollY > list().offsetTop + 40 || !panel.hidden || String(getSelection()) !== ""
  || body()?.contains(document.activeElement);

let isChecking = false;
let again = false;
async function enter() {
  if (isChecking) { again = true; return; }
  isChecking = true;
  try {
    do {
      again = false;
      await enterOnce();
    } while (again);
  } catch { /* the next change tries again */ } finally {
    isChecking = false;
  }
}

async function enterOnce() {
  if (listRequest || isPaused()) return;
  if (!body()) {
    if (!parameters().get("before")) await loadList(); // the first call of all, or the first that fits
    return;
  }
  const query = filtersOnly();
  const shown = Number(body().querySelector("tr")?.dataset.sequence ?? 0);
  const onFirst = !parameters().get("before");
  const hold = !onFirst || isReading();
  query.set("after", shown);
  if (hold) query.set("count", "1");
  const { text, headers } = await get(withQuery("/fragments/rows", query));
  const number = Number(headers.get("X-Sandbox-New"));
  if (!number || listRequest || !body()) return;
  if (hold || isReading()) { showPill(number); return; }
  if (number > 100) { await loadList(); return; } // too many to enter one by one
  const fresh = elements(text);
  localise(fresh);
  body().prepend(fresh);
  const rows = body().rows;
  while (rows.length > MOST_ROWS) rows[rows.length - 1].remove();
  hidePill();
  refreshTotal();
  sayNew(number);
}

let unsaid = 0;
let saying = null;
function sayNew(number) { // now and then: a screen reader should not talk all the time
  unsaid += number;
  saying ??= setTimeout(() => {
    say(`${unsaid} new ${unsaid === 1 ? "call" : "calls"}`);
    unsaid = 0;
    saying = null;
  }, 5000);
}

function refreshTotal() {
  clearTimeout(refreshTotal.waiting);
  refreshTotal.waiting = setTimeout(async () => {
    try {
      const { text } = await get(withQuery("/fragments/calls", filtersOnly()));
      const fresh = elements(text).querySelector(".paging");
      const older = body()?.rows.length > 100 ? document.querySelector(".paging [rel=next]") : null;
      if (!fresh || listRequest || parameters().get("before")) return;
      if (older) fresh.querySelector("[rel=next]")?.replaceWith(olderThanShown());
      document.querySelector(".paging")?.replaceWith(fresh);
    } catch { /* the next change tries again */ }
  }, 1000);
}

function olderThanShown() {
  const rows = body().rows;
  const query = filtersOnly();
  query.set("before", rows[rows.length - 1].dataset.sequence);
  const link = document.createElement("a");
  link.rel = "next";
  link.textContent = "Older";
  link.href = withQuery("/", query);
  return link;
}

function showPill(number) {
  const pill = document.querySelector(".pill");
  if (!pill) return;
  pill.hidden = false;
  document.getElementById("newer-calls").textContent = `↑ ${number > 100 ? "more than 100" : number} new ${number === 1 ? "call" : "calls"}`;
}
function hidePill() {
  const pill = document.querySelector(".pill");
  if (pill) pill.hidden = true;
}

let overviewAt = 0;
let overviewWaiting = null;
function overviewSoon() {
  if (overviewWaiting || isPaused() || document.hidden) return;
  overviewWaiting = setTimeout(() => {
    overviewWaiting = null;
    overviewAt = Date.now();
    loadOverview({ polite: true });
  }, Math.max(0, 2000 - (Date.now() - overviewAt)));
}

cover();
let known = Number(list().dataset.last);
onChange((state) => {
  if (state.last < known || (state.last === 0 && body())) loadList(); // somebody cleared
  else if (state.last > known || !list().dataset.last) enter();
  known = state.last;
  overviewSoon();
});
setInterval(overviewSoon, 5000); // time goes on without calls too
addEventListener("scroll", () => {
  if (document.querySelector(".pill:not([hidden])") && scrollY < 40 && panel.hidden) enter();
}, { passive: true });

// One call

async function showCall() {
  const sequence = parameters().get("call");
  mark(sequence);
  document.querySelector(".gone")?.remove();
  callRequest?.abort();
  if (!sequence) {
    if (!panel.hidden) closePanel();
    return;
  }
  if (panel.querySelector(".call")?.dataset.sequence === sequence) { panel.hidden = false; return; }
  const request = (callRequest = new AbortController());
  try {
    const { text } = await get(withQuery(`/fragments/call/${encodeURIComponent(sequence)}`, filtersOnly()), request.signal);
    const fresh = elements(text);
    localise(fresh);
    panel.replaceChildren(fresh);
    panel.hidden = false;
    cover();
    panel.scrollTop = 0;
    const title = panel.querySelector("h2");
    title.focus({ preventScroll: true });
  } catch (error) {
    if (error.name === "AbortError") return;
    say(error.status === 404 ? "That call has been forgotten" : "The call could not be loaded");
    const query = parameters();
    query.delete("call");
    history.replaceState(null, "", withQuery("/", query));
    closePanel();
  }
}

function mark(sequence) {
  for (const row of document.querySelectorAll("#rows tr[aria-current]")) row.removeAttribute("aria-current");
  if (sequence) rowOf(sequence)?.setAttribute("aria-current", "true");
}

const rowOf = (sequence) => body()?.querySelector(`tr[data-sequence="${CSS.escape(sequence)}"]`) ?? null;

function closePanel() {
  const sequence = panel.querySelector(".call")?.dataset.sequence;
  panel.hidden = true;
  panel.replaceChildren();
  cover();
  const row = sequence && rowOf(sequence);
  if (row) row.querySelector("a.open").focus({ preventScroll: true });
}

function openCall(sequence) {
  const query = parameters();
  query.set("call", sequence);
  go(query, { replace: parameters().has("call") });
  rowOf(String(sequence))?.scrollIntoView({ block: "nearest" });
}

// Links that stay within this view are followed without loading it again.

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  const address = new URL(link.href);
  if (address.origin !== location.origin || address.pathname !== "/" || link.target || link.closest(".top")) return;
  event.preventDefault();
  if (link.dataset.window) address.searchParams.set("window", link.dataset.window);
  if (link.matches("a.open") || "call" in link.dataset) {
    openCall(address.searchParams.get("call"));
    return;
  }
  if (link.id === "newer-calls") {
    closePanel();
    scrollTo({ top: 0 });
    history.pushState(null, "", withQuery("/", filtersOnly()));
    fillForm();
    loadList();
    return;
  }
  const stays = link.closest("#overview, .calls") && parameters().has("call") && !address.searchParams.has("call");
  if (stays) address.searchParams.delete("call");
  go(address.searchParams);
});

// The keyboard

function move(step) {
  const rows = [...(body()?.rows ?? [])];
  if (!rows.length) return;
  const open = parameters().get("call");
  const at = open ? rows.indexOf(rowOf(open)) : rows.findIndex((row) => row.contains(document.activeElement));
  const next = rows[Math.min(Math.max(at + step, 0), rows.length - 1)];
  if (open) {
    if (at >= 0 && next !== rows[at]) openCall(next.dataset.sequence);
    return;
  }
  next.querySelector("a.open").focus();
  next.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (isTyping(event.target)) {
    if (event.key === "ArrowDown" && event.target.type === "search") { event.preventDefault(); move(1); }
    return;
  }
  const acts = {
    ArrowDown: () => move(1),
    j: () => move(1),
    ArrowUp: () => move(-1),
    k: () => move(-1),
    e: () => form.elements.errors.click(),
    Escape: () => {
      if (!parameters().has("call")) { document.activeElement.blur(); return; }
      const query = parameters();
      query.delete("call");
      go(query);
    },
  };
  const act = acts[event.key];
  if (!act) return;
  if (event.target.closest("summary, [role=radiogroup], input")) { if (event.key.startsWith("Arrow")) return; }
  event.preventDefault();
  act();
});

// Forgetting

const sure = document.getElementById("sure");
const clear = document.getElementById("clear");
clear.hidden = false;
clear.addEventListener("click", () => sure.showModal());
sure.addEventListener("close", async () => {
  if (sure.returnValue !== "yes") return;
  sure.returnValue = "";
  const answer = await fetch("/api/events", { method: "DELETE" });
  say(answer.ok ? "Forgotten" : "That did not work");
  history.pushState(null, "", "/");
  known = 0;
  fillForm();
  closePanel();
  loadList();
  loadOverview();
});
