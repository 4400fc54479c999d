"use strict";
// Filters candidates by kind and text, and opens the one that a mark points to. The page works without it.
(() => {
  const cards = [...document.querySelectorAll("details.card")];
  const rollouts = [...document.querySelectorAll("article.rollout")];
  const form = document.getElementById("filter");
  const texts = new Map();

  const textOf = (card) => {
    if (!texts.has(card)) {
      const parts = [...card.querySelectorAll(".token, .window")].map((part) => part.textContent);
      texts.set(card, parts.join("\n").toLowerCase());
    }
    return texts.get(card);
  };

  const apply = () => {
    const kind = form.elements.kind.value;
    const query = form.elements.query.value.toLowerCase();
    const filtered = Boolean(kind || query.trim());
    let shown = 0;
    for (const card of cards) {
      card.hidden = Boolean(kind && card.dataset.kind !== kind) || Boolean(query.trim() && !textOf(card).includes(query));
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
    card.scrollIntoView({ block: "nearest" });
    card.querySelector("summary").focus({ preventScroll: true });
  };

  if (form) {
    form.hidden = cards.length === 0;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  const afterJump = () => requestAnimationFrame(() => setTimeout(open)); // a jump to a fragment takes the focus away
  addEventListener("hashchange", afterJump);
  document.addEventListener("click", (event) => {
    const mark = event.target.closest("a.mark");
    if (mark && mark.getAttribute("href") === location.hash) afterJump();
  });
  afterJump();
})();
