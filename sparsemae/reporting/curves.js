// A pointer over a chart reads off the values nearest to it.
(() => {
  for (const chart of document.querySelectorAll(".curve")) {
    const curves = JSON.parse(chart.dataset.read);
    const svg = chart.querySelector("svg"), output = chart.querySelector("output");
    const { width, height } = svg.viewBox.baseVal;
    const cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 0);
    cursor.setAttribute("y2", height - 26);
    const nearest = (places, x) => {
      let low = 0, high = places.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (places[middle] < x) low = middle; else high = middle;
      }
      return x - places[low] < places[high] - x ? low : high;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * width;
      const words = curves.map(({ name, x: places, steps, values }) => {
        const [mean, least, most] = values[nearest(places, x)];
        const range = least === undefined ? "" : ` (${least} to ${most})`;
        const step = steps[nearest(places, x)].toLocaleString("en");
        return `step ${step}: ${name} ${mean}${range}`;
      });
      const place = curves[0].x[nearest(curves[0].x, x)];
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      svg.append(cursor);
      output.textContent = words.join(" · ");
    });
    svg.addEventListener("pointerleave", () => { cursor.remove(); output.textContent = ""; });
  }
})();
