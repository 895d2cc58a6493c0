"use strict";
// A click on the head of a column sorts its table: numbers by the first number of a cell, empty cells last.
const numberIn = (text) => {
  const found = text.match(/^[+-]?\d+(\.\d+)?/);
  return found ? Number(found[0]) : NaN;
};
const compare = (a, b) => {
  const [x, y] = [numberIn(a), numberIn(b)];
  if (Number.isNaN(x) && Number.isNaN(y)) return a.localeCompare(b);
  return x - y;
};
const sortBy = (table, heads, place, descending) => {
  const rows = [...table.tBodies[0].rows];
  const cell = (row) => row.cells[place].textContent.trim();
  rows.sort((first, second) => {
    const [a, b] = [cell(first), cell(second)];
    if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
    return descending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[place].setAttribute("aria-sort", descending ? "descending" : "ascending");
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    if (head.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      // Names come in alphabetical order first, scores from the best.
      sortBy(table, heads, place, now ? now === "ascending" : place > 0);
    });
  });
}
