"use strict";
// Sorting, the filter, columns, copying and printing. Everything is there without it.

function order(cell) {
  if (cell.dataset.number !== undefined) return Number(cell.dataset.number);
  return cell.dataset.text; // undefined: there is no value
}

function compare(a, b) {
  const numbers = [typeof a === "number", typeof b === "number"];
  if (numbers[0] && numbers[1]) return a - b;
  if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
}

function sortBy(table, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [order(row.cells[header.cellIndex]), row]);
  const there = rows.filter(([value]) => value !== undefined);
  const missing = rows.filter(([value]) => value === undefined);
  there.sort(([a], [b]) => (descending ? -compare(a, b) : compare(a, b)));
  table.tBodies[0].append(...there.concat(missing).map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.addEventListener("click", (event) => {
    if (event.target.closest("button")) sortBy(table, event.target.closest("th"));
  });

const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.getElementById("runs-table").tBodies[0].rows];
  const texts = new Map(rows.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]));
  const narrow = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => texts.get(row).includes(word));
    const left = rows.filter((row) => !row.hidden).length;
    document.getElementById("filtered").textContent = words.length ? `${left} of ${rows.length}` : "";
  };
  filter.addEventListener("input", narrow);
  narrow(); // a browser that goes back fills the box again
}

const allSettings = document.getElementById("all-settings");
if (allSettings) {
  const [more, fewer] = [allSettings.textContent, "show fewer settings"];
  allSettings.addEventListener("click", () => {
    const all = document.getElementById("runs-table").classList.toggle("all");
    allSettings.setAttribute("aria-pressed", String(all));
    allSettings.textContent = all ? fewer : more;
  });
}

async function copy(button, code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "selected";
  }
  setTimeout(() => (button.textContent = "copy"), 2000);
}

for (const line of document.querySelectorAll("p.command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.addEventListener("click", () => copy(button, line.querySelector("code")));
  line.append(button);
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
