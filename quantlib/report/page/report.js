const table = document.getElementById("table"), body = table.tBodies[0], rows = [...body.rows];
const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("th");
  if (!head) return;
  const down = head.ariaSort !== "descending", numeric = head.classList.contains("n");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => numeric ? a - b : String(a).localeCompare(b, "en", { numeric: true });
  const column = head.cellIndex, sign = down ? -1 : 1;
  body.append(...rows.sort((a, b) => sign * order(value(a, column), value(b, column))));
});
document.getElementById("filter").addEventListener("input", (event) => {
  const terms = event.target.value.toLowerCase().split(/[\s,]+/);
  for (const row of rows) {
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !terms.every((term) => text.includes(term));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
});
