// Tells the cell under the pointer of an affinity map, from the numbers that the page carries.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.querySelector(".tip");
  const hide = () => { tip.style.display = "none"; };
  for (const map of document.querySelectorAll("svg[data-pair]")) {
    const ids = (name) => map.dataset[name].split(" ").map(Number);
    const [rows, columns, frame] = [ids("rows"), ids("columns"), ids("frame")];
    const counts = data.transitions[Number(map.dataset.pair)];
    const layer = Number(map.dataset.pair);
    map.addEventListener("pointerleave", hide);
    map.addEventListener("pointermove", (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
      const [left, top, side] = frame;
      const x = Math.floor(((point.x - left) / side) * columns.length);
      const y = Math.floor(((point.y - top) / side) * rows.length);
      if (!(columns[x] >= 0) || !(rows[y] >= 0)) return hide();
      const row = counts[rows[y]];
      const total = row.reduce((sum, count) => sum + count, 0);
      const share = total > 0 ? (100 * row[columns[x]]) / total : 0;
      tip.textContent = `layer ${layer} expert ${rows[y]} → layer ${layer + 1} expert ${columns[x]}: ` +
        `${share.toFixed(1)} % of ${Math.round(total)} tokens`;
      tip.style.display = "block";
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
    });
  }
})();
