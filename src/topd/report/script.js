"use strict";
// Filters candidates by kind, token and text, opens the one that a mark points to, and draws a candidate's alignment
// when it is opened. The page can be read without it. What a model wrote only ever becomes text, never markup.
(() => {
  const cards = [...document.querySelectorAll("details.card")];
  const rollouts = [...document.querySelectorAll("article.rollout")];
  const form = document.getElementById("filter");
  const futures = JSON.parse(document.getElementById("futures").textContent);
  const texts = new Map();

  const make = (name, parent, text) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  const shape = (name, parent, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };

  const windowOf = (tokens, name, moved, parent) => {
    const list = make("ol", parent);
    list.className = name;
    tokens.forEach((token, place) => {
      const item = make("li", list);
      if (moved.has(place)) item.className = "moved";
      make("b", item, token);
    });
  };

  const draw = (card) => {
    const ladder = card.querySelector(".ladder");
    const future = futures[card.id.slice(1)];
    if (!ladder || !future || ladder.firstChild) return;
    const [student, teacher, links, best] = future;
    const same = new Set(best.filter(([i, j]) => student[i] === teacher[j]).map(([i]) => i));
    const movedHere = new Set(student.map((_, i) => i).filter((i) => !same.has(i)));
    const movedThere = new Set(links.filter(([i, j]) => student[i] !== teacher[j]).map(([, j]) => j));
    make("h5", ladder, "Student");
    make("h5", ladder, "Teacher");
    windowOf(student, "student", movedHere, ladder);
    const rows = Math.max(student.length, teacher.length);
    const said = best.map(([i, j]) => `${i + 1} to ${j + 1}`).join(", ") || "none";
    const svg = shape("svg", ladder, {
      viewBox: `0 0 10 ${2 * rows}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Transport plan, student token to teacher token: ${said}`,
    });
    svg.style.setProperty("--rows", rows);
    for (const [i, j, weak] of links) {
      const [left, right] = [2 * i + 1, 2 * j + 1];
      const d = left === right ? `M0 ${left}H10` : `M0 ${left}C5 ${left} 5 ${right} 10 ${right}`;
      shape("path", svg, { d, class: (student[i] === teacher[j] ? "same" : "moved") + (weak ? " weak" : "") });
    }
    windowOf(teacher, "teacher", movedThere, ladder);
  };

  const textOf = (card) => {
    if (!texts.has(card)) {
      const parts = [...card.querySelectorAll(".token, .window")].map((part) => part.textContent);
      texts.set(card, parts.join("\n").toLowerCase());
    }
    return texts.get(card);
  };

  const apply = () => {
    const { kind, token, query } = Object.fromEntries(new FormData(form));
    const wanted = query.trim() ? query.toLowerCase() : "";
    const filtered = Boolean(kind || token || wanted);
    let shown = 0;
    for (const card of cards) {
      const { kind: itsKind, token: itsToken } = card.dataset;
      card.hidden =
        (kind && itsKind !== kind) || (token && itsToken !== token) || Boolean(wanted && !textOf(card).includes(wanted));
      shown += card.hidden ? 0 : 1;
    }
    for (const rollout of rollouts) {
      rollout.hidden = filtered && !rollout.querySelector("details.card:not([hidden])");
    }
    form.elements.count.value = filtered ? `${shown} of ${cards.length}` : "";
    document.getElementById("nothing").hidden = shown > 0 || !filtered;
  };

  const open = () => {
    const card = document.getElementById(location.hash.slice(1));
    if (!card || !card.matches("details.card")) return;
    if (card.hidden) {
      form.reset();
      apply();
    }
    card.open = true;
    draw(card);
    card.scrollIntoView({ block: "nearest" });
    card.querySelector("summary").focus({ preventScroll: true });
  };

  if (form) {
    form.hidden = cards.length === 0;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  document.addEventListener("toggle", (event) => event.target.matches("details.card") && draw(event.target), true);
  const afterJump = () => requestAnimationFrame(() => setTimeout(open)); // a jump to a fragment takes the focus away
  addEventListener("hashchange", afterJump);
  document.addEventListener("click", (event) => {
    const mark = event.target.closest("a.mark");
    if (mark && mark.getAttribute("href") === location.hash) afterJump();
  });
  afterJump();
})();
