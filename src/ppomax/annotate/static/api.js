// Questions to the server. Every one is a POST of JSON; the token comes with the link.

export class Refused extends Error {
  constructor(status) {
    super(`status ${status}`);
    this.status = status; // 0: no answer at all
  }
}

const fragment = new URLSearchParams(location.hash.slice(1));
if (fragment.has("token")) {
  sessionStorage.setItem("token", fragment.get("token"));
  history.replaceState(null, "", location.pathname); // not to be seen over a shoulder
}

export async function ask(question, body) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(`/api/${question}`, {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(20000),
    });
    if (answer.ok) return await answer.json();
  } catch {
    throw new Refused(0);
  }
  throw new Refused(answer.status);
}
