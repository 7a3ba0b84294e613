"use strict";
// Adds sorting, filtering and the choice of a metric; without it the page shows every metric.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const say = (text) => { document.getElementById("status").textContent = text; };

function judgeBy(metric) {
  for (const part of all("[data-metric]")) part.hidden = part.dataset.metric !== metric;
  for (const cell of all("table.sortable [data-kind]"))
    cell.classList.toggle("chosen", cell.dataset.kind === metric);
}

function sort(table, header, ascending) {
  const column = header.cellIndex;
  const key = (row) => {
    const cell = row.cells[column];
    if (header.classList.contains("name")) return cell.textContent.trim().toLowerCase();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null); // missing values come last
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...rows);
  for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const table of all("table.sortable"))
  for (const header of all("th[aria-sort]", table))
    header.querySelector("button").addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      sort(table, header, ascending);
      say(`Sorted by ${header.textContent.trim()}, ${ascending ? "ascending" : "descending"}`);
    });

for (const input of all("input[name=metric]"))
  input.addEventListener("change", () => {
    judgeBy(input.value);
    say(`Judged by ${input.parentElement.textContent.trim()}`);
  });

document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, count = 0;
  for (const row of all("table.filtered tbody tr")) {
    const text = row.cells[0].textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
    count += 1;
  }
  say(words.length ? `${shown} of ${count} rows shown` : "");
});

const chosen = document.querySelector("input[name=metric]:checked");
if (chosen) judgeBy(chosen.value);
