// The editors: checked as one types, saved with the server's own checks, in force at once.

import { say } from "./app.js";
import { documentOf, get } from "./fragment.js";

const examples = {
  route: { _id: "block-admin", type: "regex", state: 2, name: "Nobody reaches /admin", block: true,
    regex_config: [{ conditions: [{ path: "request.route", value: "^/admin" }] }],
    response: { status: 403, headers: {}, body: { error: "forbidden", message: "blocked by the sandbox" } } },
  company: { _id: "over-quota", type: "company", state: 2, name: "Companies over their quota", block: true, applied_to: "matching",
    variables: [{ name: "0", path: "company_id" }], regex_config: [],
    response: { status: 429, headers: { "Retry-After": "60" }, body: { error: "too_many", message: "{{0}} has used its calls" } } },
  headers: { _id: "add-header", type: "regex", state: 2, name: "Tell about the new version", block: false,
    regex_config: [{ conditions: [{ path: "request.verb", value: "GET" }] }],
    response: { headers: { "X-Notice": "version 2 is there" } } },
};

function place(text, error) {
  // V8 and Firefox tell where; others only what.
  const line = /line (\d+)/i.exec(error.message)?.[1];
  const position = /position (\d+)/.exec(error.message)?.[1];
  if (line) return `line ${line}: `;
  if (position) return `line ${text.slice(0, Number(position)).split("\n").length}: `;
  return "";
}

async function refreshInForce() {
  try {
    const fresh = documentOf((await get(location.href)).text).querySelector("section.rules");
    document.querySelector("section.rules").replaceWith(fresh);
  } catch { /* what was saved has been said */ }
}

for (const form of document.querySelectorAll("form.editor")) {
  const area = form.querySelector("textarea");
  const save = form.querySelector("button.primary");
  const faults = form.querySelector(".faults");
  const name = form.dataset.document;
  let saved = area.value;

  const show = (items, isFine = false) => {
    const shown = document.createElement("ul");
    for (const { field, message } of items) {
      const item = document.createElement("li");
      if (isFine) item.className = "fine";
      if (field) item.append(Object.assign(document.createElement("code"), { textContent: field }));
      item.append(message);
      shown.append(item);
    }
    faults.replaceChildren(...(items.length ? [shown] : []));
    area.classList.toggle("wrong", items.length > 0 && !isFine);
  };

  const check = () => {
    let fault = [];
    try {
      JSON.parse(area.value);
    } catch (error) {
      fault = [{ field: "", message: place(area.value, error) + error.message }];
    }
    show(fault);
    save.disabled = fault.length > 0 || area.value === saved;
  };
  area.addEventListener("input", check);

  form.querySelector(".format").addEventListener("click", () => {
    try {
      area.value = JSON.stringify(JSON.parse(area.value), null, 2);
    } catch { /* said already */ }
    check();
  });

  form.querySelector(".example")?.addEventListener("change", (event) => {
    const example = examples[event.target.value];
    event.target.value = "";
    if (!example) return;
    let rules = [];
    try { rules = JSON.parse(area.value); } catch { /* starts anew */ }
    const taken = new Set(Array.isArray(rules) ? rules.map((rule) => rule?._id) : []);
    let identity = example._id;
    for (let number = 2; taken.has(identity); number += 1) identity = `${example._id}-${number}`;
    area.value = JSON.stringify([...(Array.isArray(rules) ? rules : []), { ...example, _id: identity }], null, 2);
    check();
    area.focus();
    area.scrollTop = area.scrollHeight;
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (save.disabled) return;
    save.disabled = true;
    const text = area.value;
    const id = new URLSearchParams(location.search).get("application_id");
    const path = name === "behaviour" ? "/api/behaviour" : `/api/documents/${name}${id ? `?application_id=${encodeURIComponent(id)}` : ""}`;
    try {
      const answer = await fetch(path, { method: "PUT", body: text, headers: { "Content-Type": "application/json" } });
      if (answer.ok) {
        saved = text;
        show([{ field: "", message: "Saved and in force" }], true);
        say("Saved and in force");
        refreshInForce();
      } else {
        const { error } = await answer.json();
        show(error.faults ?? [{ field: error.field ?? "", message: error.message }]);
      }
    } catch {
      show([{ field: "", message: "The sandbox did not answer" }]);
    }
    save.disabled = area.value === saved;
  });

  area.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && (event.key === "s" || event.key === "Enter")) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}

document.getElementById("application")?.addEventListener("change", (event) => {
  location.search = event.target.value ? `?application_id=${encodeURIComponent(event.target.value)}` : "";
});
addEventListener("beforeunload", (event) => {
  if (document.querySelector("form.editor button.primary:not(:disabled)")) event.preventDefault();
});
