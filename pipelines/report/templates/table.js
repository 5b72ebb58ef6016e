// A click on the head of a column sorts its table; another click turns the order round.
for (const head of document.querySelectorAll("th")) {
  head.querySelector("button").addEventListener("click", () => {
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const compare = (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if ("key" in x.dataset && "key" in y.dataset) return x.dataset.key - y.dataset.key;
      return x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
    };
    const rows = [...body.rows].sort(compare);
    body.append(...(falling ? rows.reverse() : rows));
  });
}
