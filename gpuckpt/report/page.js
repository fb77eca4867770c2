"use strict";
// The page is whole without this: it adds what is held at a point in time, and the plans of other budgets.
const data = JSON.parse(document.getElementById("data").textContent);
const one = (name) => document.querySelector(name);

// Where a pointer is in `area`, from 0 at its left edge to 100 at its right.
function share(area, event) {
  const box = area.getBoundingClientRect();
  return (100 * (event.clientX - box.left)) / box.width;
}

function nearest(places, x) {
  return places.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(places[best] - x) ? i : best), 0);
}

// Arrow keys, Page up and down, Home and End walk over `count` positions.
function walk(area, count, now, go) {
  area.addEventListener("keydown", (event) => {
    const last = count - 1;
    const moves = {
      ArrowLeft: now() - 1, ArrowDown: now() - 1, ArrowRight: now() + 1, ArrowUp: now() + 1,
      PageDown: now() - 10, PageUp: now() + 10, Home: 0, End: last,
    };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(Math.min(Math.max(moves[event.key], 0), last));
  });
}

const step = one(".step");
if (step) {
  const cursor = one(".step .cursor");
  const told = one("#moment");
  let moment = -1;
  const show = (i) => {
    moment = i;
    cursor.hidden = false;
    cursor.style.left = `${data.moments[i][0]}%`;
    told.textContent = data.moments[i][1];
    step.setAttribute("aria-valuenow", i);
    step.setAttribute("aria-valuetext", data.moments[i][1]);
  };
  const point = (event) => {
    const x = share(step, event);
    const after = data.moments.findIndex((each) => each[0] > x);
    show(Math.max((after < 0 ? data.moments.length : after) - 1, 0)); // what is held from there on
  };
  step.addEventListener("pointermove", point);
  step.addEventListener("pointerdown", point);
  walk(step, data.moments.length, () => moment, show);
}

const budgets = one(".budgets");
const places = data.plans.map((plan) => plan.at[0]);
const rows = [...document.querySelectorAll(".stages tbody tr")];
const back = one("#back");
let chosen = data.ran;

function choose(i) {
  chosen = i;
  const plan = data.plans[i];
  const ring = one(".ring");
  ring.style.left = `${plan.at[0]}%`;
  ring.style.top = `${plan.at[1]}%`;
  one("#plan").textContent = plan.told;
  budgets.setAttribute("aria-valuenow", i);
  budgets.setAttribute("aria-valuetext", plan.told);
  back.hidden = i === data.ran;
  rows.forEach((row, number) => {
    const [again, ...cells] = data.rows[plan.rows[number]];
    row.classList.toggle("again", again);
    row.classList.toggle("changed", cells[0] !== data.rows[data.plans[data.ran].rows[number]][1]);
    row.querySelectorAll(".cell").forEach((cell, k) => { cell.textContent = cells[k]; });
  });
}

budgets.addEventListener("pointerdown", (event) => {
  budgets.setPointerCapture(event.pointerId);
  choose(nearest(places, share(one(".room"), event)));
});
budgets.addEventListener("pointermove", (event) => {
  if (budgets.hasPointerCapture(event.pointerId)) choose(nearest(places, share(one(".room"), event)));
});
walk(budgets, places.length, () => chosen, choose);
budgets.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(data.ran); });
back.addEventListener("click", () => { choose(data.ran); budgets.focus(); });
document.querySelectorAll(".screen").forEach((each) => { each.hidden = each === back; });
