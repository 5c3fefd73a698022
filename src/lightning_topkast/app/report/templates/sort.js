"use strict";
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      return x && y ? sign * (x - y || x.localeCompare(y)) : !x - !y; // what is not known is last
    };
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const body = head.closest("table").tBodies[0];
    body.append(...[...body.rows].sort(compare));
  });
}
