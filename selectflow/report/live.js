// Asks every two seconds whether a run has changed, and only then puts the new page in place of the
// old one. What the reader has chosen stays: the axis, and which parts are open.
"use strict";

const EVERY_MS = 2000;
const main = () => document.querySelector("main");

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.text();
}

function keepChoices(next) {
  const axis = document.querySelector("[name=axis]:checked");
  const same = axis && next.querySelector(`[name=axis][value=${axis.value}]`);
  if (same) same.setAttribute("checked", "");
  const open = new Map();
  for (const part of document.querySelectorAll("details")) open.set(part.querySelector("summary").textContent, part.open);
  for (const part of next.querySelectorAll("details")) {
    const title = part.querySelector("summary").textContent;
    if (open.has(title)) part.open = open.get(title);
  }
}

async function refresh() {
  try {
    if (!document.hidden && (await get("version")) !== main().dataset.version) {
      const page = new DOMParser().parseFromString(await get("./"), "text/html");
      const next = page.querySelector("main");
      keepChoices(next);
      main().replaceWith(next);
      document.title = page.title;
    }
    document.body.classList.remove("lost");
  } catch {
    document.body.classList.add("lost");
  }
  setTimeout(refresh, EVERY_MS);
}

setTimeout(refresh, EVERY_MS);
