// HTML from this server into the page: the only place where text becomes elements.
// The server's templates escape all they are given; the content security policy lets no script or style in besides.

const policy = globalThis.trustedTypes?.createPolicy("sandbox", { createHTML: (text) => text }) ?? { createHTML: (text) => text };

export function elements(text) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(text);
  return template.content;
}

export function documentOf(text) {
  return new DOMParser().parseFromString(policy.createHTML(text), "text/html");
}

export async function get(path, signal) {
  const answer = await fetch(path, { signal, headers: { Accept: "text/html" } });
  if (!answer.ok) throw Object.assign(new Error(`${answer.status} for ${path}`), { status: answer.status });
  return { text: await answer.text(), headers: answer.headers };
}
