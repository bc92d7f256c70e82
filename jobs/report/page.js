// Read-outs under the pointer. The page says all it has to say without them.
const tip = document.getElementById("tip");
const show = (event, text) => {
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 16 + "px";
};
const digits = (value) => (value && Math.abs(value) < 1e-3 ? value.toExponential(2) : `${+value.toPrecision(4)}`);

for (const svg of document.querySelectorAll(".chart svg")) {
  const [first, last, low, high, isLog] = svg.dataset.frame.split(" ").map(Number);
  const [left, right, top, bottom] = [50, 550, 8, 168]; // as chart.py has them
  const valueAt = (y) => {
    const share = (bottom - y) / (bottom - top);
    return isLog ? low * (high / low) ** share : low + share * (high - low);
  };
  const lines = [...svg.querySelectorAll("polyline")].map((line) => [line.dataset.name, [...line.points]]);
  const cursor = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  cursor.setAttribute("class", "cursor");
  // A browser would show the title itself, over the read-out.
  const title = svg.querySelector("title");
  svg.setAttribute("aria-label", title.textContent);
  title.remove();
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const x = Math.min(Math.max(at.x, left), right);
    const step = Math.round(first + ((x - left) / (right - left)) * (last - first));
    const said = lines.map(([name, points]) => {
      const nearest = points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
      return `${name} ${digits(valueAt(nearest.y))}`;
    });
    cursor.setAttribute("d", `M${x} ${top}V${bottom}`);
    show(event, [`step ${step.toLocaleString("en")}`, ...said].join("\n"));
  });
  svg.addEventListener("pointerleave", () => (cursor.removeAttribute("d"), (tip.hidden = true)));
}

for (const heat of document.querySelectorAll(".heat")) {
  const image = heat.querySelector("img");
  const { row: rowName, column: columnName, first, last, doublings } = heat.dataset;
  let pixels;
  image.addEventListener("pointermove", (event) => {
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (!pixels) {
      const context = new OffscreenCanvas(width, height).getContext("2d");
      context.drawImage(image, 0, 0);
      pixels = context.getImageData(0, 0, width, height).data;
    }
    const box = image.getBoundingClientRect();
    const index = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    const column = index((event.clientX - box.left) / box.width, width);
    const row = index((event.clientY - box.top) / box.height, height);
    const [red, , blue, alpha] = pixels.slice(4 * (row * width + column));
    const isLess = blue > red;
    const ratio = digits(2 ** (((isLess ? -1 : 1) * doublings * alpha) / 255));
    const about = alpha < 255 ? `about ${ratio}` : `${ratio} or ${isLess ? "less" : "more"}`;
    const at = Math.round(+first + (column / Math.max(width - 1, 1)) * (last - first));
    show(event, `${rowName} ${row}, ${columnName} ${at.toLocaleString("en")}\n${about} of the mean`);
  });
  image.addEventListener("pointerleave", () => (tip.hidden = true));
}
