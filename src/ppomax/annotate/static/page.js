// The page: one pair at a time, and the next one only when the server has the vote on disk.

import { ask } from "./api.js";
import { STRINGS } from "./strings.js";
import { fill } from "./text.js";

const BLIND_MS = 250; // a vote sooner after a pair appeared is a key hit twice, not a judgement

const $ = (id) => document.getElementById(id);
const choices = [...document.querySelectorAll("[data-choice]")];

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let annotator = sessionStorage.getItem("annotator");
let state = null; // what the server said last: pair, progress, undo
let busy = false;
let again = null; // the request that failed, to be sent once more

// --- time that the pair was in view

let shown = 0;
let since = 0;
let looked = 0;

function restartClock() {
  shown = since = performance.now();
  looked = 0;
}

function secondsLooked() {
  const now = document.hidden ? since : performance.now();
  return Math.round((looked + now - since) / 10) / 100;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) looked += performance.now() - since;
  since = performance.now();
});

// --- words

const say = (key, ...values) => {
  const found = STRINGS[language][key];
  return typeof found === "function" ? found(...values) : found;
};

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
  $("language").textContent = say("other");
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  $("status").textContent = "";
  if (state) draw();
}

// --- what is seen

function screen(name) {
  for (const id of ["start", "vote", "done"]) $(id).hidden = id !== name;
  $("actions").hidden = name === "start";
  $("actions").classList.toggle("bare", name !== "vote");
  $("progress").hidden = $("help-open").hidden = name === "start";
}

function turn({ role, content }) {
  const element = document.createElement("div");
  const who = document.createElement("p");
  const text = document.createElement("div");
  element.className = `turn ${role === "user" ? "user" : "model"}`;
  who.className = "role";
  who.textContent = say(role) ?? role;
  text.className = "text";
  text.dir = "auto";
  fill(text, content);
  element.append(who, text);
  return element;
}

function drawDialogue(messages) {
  const turns = messages.map(turn);
  const last = turns.pop();
  const parts = [last];
  if (turns.length) {
    const earlier = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = say("earlier", turns.length);
    earlier.append(summary, ...turns);
    earlier.open = $("dialogue").querySelector("details")?.open ?? true;
    parts.unshift(earlier);
  }
  $("dialogue").replaceChildren(...parts);
}

function draw() {
  const { pair, progress } = state;
  $("bar").max = progress.wanted;
  $("bar").value = progress.votes;
  const pace = progress.seconds === null ? [] : [say("pace", Math.round(progress.seconds))];
  $("counts").textContent = [say("counts", progress.mine, progress.left), ...pace].join(" · ");
  $("undo").disabled = $("done-undo").disabled = state.undo === null;
  $("who").textContent = say("who", annotator);
  screen(pair ? "vote" : "done");
  if (!pair) {
    $("done-text").textContent = say("doneText", progress.mine);
    return;
  }
  $("question").textContent = say(pair.question);
  $("hint").textContent = say(`${pair.question}Hint`);
  $("dialogue").lang = $("first").lang = $("second").lang = pair.lang; // picks the right Chinese glyphs
  drawDialogue(pair.messages);
  for (const side of ["first", "second"]) fill($(side), pair[side].trim() ? pair[side] : say("empty"));
}

function openNote(open) {
  $("note-field").hidden = !open;
  $("note-open").setAttribute("aria-expanded", String(open));
}

// A new pair: the reading starts at its top, for eyes and for screen readers.
function show(found) {
  state = found;
  $("note").value = found.pair?.note ?? "";
  openNote($("note").value !== "");
  draw();
  $("vote").classList.remove("fresh");
  void $("vote").offsetWidth; // lets the animation start once more
  $("vote").classList.add("fresh");
  $(found.pair ? "question" : "done-title").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  restartClock();
}

// --- asking

const PROBLEMS = { 0: "unreachable", 401: "noToken", 503: "notSaved" };

function problem(status) {
  $("problem").hidden = status === null;
  if (status === null) return;
  $("problem-text").textContent = say(PROBLEMS[status] ?? "refused");
  $("retry").focus();
}

async function request(question, body, told) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    const found = await ask(question, { annotator, ...body });
    again = null;
    problem(null);
    show(found);
    $("status").textContent = told ? say(told) : "";
  } catch (error) {
    if (error.status === undefined) throw error;
    await failed(error.status, () => request(question, body, told));
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

async function failed(status, retry) {
  if (status === 409) {
    busy = false;
    await request("next", {}, "elsewhere");
  } else if (state === null) {
    screen("start");
    $("name-error").textContent = say(status === 400 ? "nameBad" : (PROBLEMS[status] ?? "refused"));
    $("name").focus();
  } else {
    again = retry;
    problem(status);
  }
}

function vote(choice) {
  if (!state?.pair || performance.now() - shown < BLIND_MS) return;
  const { id } = state.pair;
  request("vote", { pair: id, choice, note: $("note").value, seconds: secondsLooked() }, "saved");
}

function undo() {
  if (state && state.undo !== null) request("undo", { pair: state.undo }, "undone");
}

function toggleNote() {
  openNote($("note-field").hidden);
  $($("note-field").hidden ? "note-open" : "note").focus();
}

// --- hands

for (const button of choices) button.addEventListener("click", () => vote(button.dataset.choice));
for (const id of ["undo", "done-undo"]) $(id).addEventListener("click", undo);
$("note-open").addEventListener("click", toggleNote);
$("again").addEventListener("click", () => request("next", {}));
$("retry").addEventListener("click", () => again?.());
$("help-open").addEventListener("click", () => $("help").showModal());
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
});
$("keys").checked = localStorage.getItem("keys") !== "off";
document.body.classList.toggle("no-keys", !$("keys").checked);
$("keys").addEventListener("change", () => {
  localStorage.setItem("keys", $("keys").checked ? "on" : "off");
  document.body.classList.toggle("no-keys", !$("keys").checked);
});
$("start-form").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = $("name").value.normalize("NFC").trim().replace(/\s+/g, " ");
  $("name-error").textContent = annotator ? "" : say("nameBad");
  if (annotator) begin();
});
$("change").addEventListener("click", () => {
  $("help").close();
  sessionStorage.removeItem("annotator");
  annotator = state = null;
  problem(null);
  screen("start");
  $("name").select();
});

const KEYS = {
  a: () => vote("first"),
  1: () => vote("first"),
  b: () => vote("second"),
  2: () => vote("second"),
  t: () => vote("tie"),
  3: () => vote("tie"),
  s: () => vote("skip"),
  u: undo,
  n: toggleNote,
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.target === $("note") && event.key === "Escape") {
    $("note-open").focus();
    if (!$("note").value) openNote(false);
    return;
  }
  const typing = event.target.matches("input, textarea") || $("help").open;
  if (typing || event.repeat || event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = KEYS[event.key.toLowerCase()];
  if (!act || !state || !$("keys").checked) return;
  event.preventDefault();
  act();
});

// --- start

async function begin() {
  await request("next", {});
  if (!state) return;
  sessionStorage.setItem("annotator", annotator);
  localStorage.setItem("name", annotator);
}

translate();
if (annotator) begin();
else {
  $("name").value = localStorage.getItem("name") ?? "";
  screen("start");
}
