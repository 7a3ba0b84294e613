"use strict";
// Adds sorting by the headings of tables; the page is whole without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

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
    header.querySelector("button").addEventListener("click", () =>
      sort(table, header, header.getAttribute("aria-sort") !== "ascending"));
