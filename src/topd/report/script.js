"use strict";
// Shows ten candidates and ten rollouts and more on demand, filters candidates, opens the one that a link points to,
// draws a candidate's alignment when it is opened, and marks tables that scroll sideways. Without this script the page
// shows everything. Text from a model only ever becomes text, never markup.
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
    const future = futures[card.id.slice(1) - 1];
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

  // A list that shows the first of its matching items and has a paragraph with buttons for more.
  const paged = (items, more) => {
    const [report, step, all] = more ? more.children : [];
    const first = more ? Number(step.dataset.by) : 0;
    const list = { limit: first, matches: () => true };
    list.apply = () => {
      let matching = 0;
      for (const item of items) {
        const wanted = list.matches(item);
        matching += wanted ? 1 : 0;
        item.hidden = !wanted || matching > list.limit;
      }
      if (!more) return matching;
      more.hidden = items.length === 0;
      report.value = `${Math.min(matching, list.limit)} of ${matching} shown` +
        (matching < items.length ? ` (${items.length} without the filter)` : "");
      step.hidden = all.hidden = matching <= list.limit;
      return matching;
    };
    // The focus follows: a button that disappears would otherwise leave it at the top of the page.
    const grow = (limit) => {
      const next = items.filter((item) => list.matches(item))[list.limit];
      list.limit = limit;
      list.apply();
      if (next) (next.querySelector("summary, a") || next).focus({ preventScroll: true });
    };
    if (more) {
      step.addEventListener("click", () => grow(list.limit + first));
      all.addEventListener("click", () => grow(Infinity));
    }
    list.reveal = (item) => {
      list.limit = Math.max(list.limit, items.filter((each) => list.matches(each)).indexOf(item) + 1);
      list.apply();
    };
    list.apply();
    return list;
  };
  const cardList = paged(cards, document.getElementById("more-candidates"));
  const rolloutList = paged(rollouts, document.getElementById("more-rollouts"));

  const filter = () => {
    const { kind, source, token, query } = Object.fromEntries(new FormData(form));
    const text = query.trim() ? query.toLowerCase() : "";
    cardList.matches = (card) =>
      (!kind || card.dataset.kind === kind) && (!source || card.dataset.source === source) &&
      (!token || card.dataset.token === token) && (!text || textOf(card).includes(text));
    document.getElementById("nothing").hidden = cardList.apply() > 0;
  };

  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target || !target.matches("details.card, article.rollout")) return;
    const list = target.matches("details.card") ? cardList : rolloutList;
    if (!list.matches(target)) {
      form.reset();
      filter();
    }
    list.reveal(target);
    if (list === cardList) {
      target.open = true;
      draw(target);
      target.querySelector("summary").focus({ preventScroll: true });
    }
    target.scrollIntoView({ block: "nearest" });
  };

  if (form) {
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  document.addEventListener("toggle", (event) => event.target.matches("details.card") && draw(event.target), true);
  const afterJump = () => requestAnimationFrame(() => setTimeout(open)); // a jump to a fragment takes the focus away
  addEventListener("hashchange", afterJump);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.getAttribute("href") === location.hash) afterJump();
  });
  afterJump();

  const nav = document.querySelector("nav");
  new ResizeObserver(() => document.documentElement.style.setProperty("--nav", `${nav.offsetHeight}px`)).observe(nav);

  const hint = (region) => region.classList.toggle("wider", region.scrollWidth > region.clientWidth + 1);
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => hint(entry.target)));
  document.querySelectorAll(".scroll").forEach((region) => watch.observe(region));
})();
