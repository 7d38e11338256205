"use strict";
// Views of one slice side by side: a grey volume each, with cells hidden or classes in colour. Axes
// of a volume run to the right, to the front and up, and an array is stored with the last axis
// fastest.
(async () => {
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const note = document.getElementById("viewer-note");
  const fail = (words) => {
    note.textContent = words;
    note.hidden = false;
    viewer.hidden = true;
  };
  if (typeof DecompressionStream === "undefined") {
    fail("This browser cannot unpack the volumes (it lacks DecompressionStream): use one from " +
      "2023 or later.");
    return;
  }
  const data = JSON.parse(document.getElementById("volumes").textContent);
  const PLANES = { // fixed axis, axis to the right, axis up, letters left, right, top, bottom
    axial: [2, 0, 1, "L", "R", "A", "P"],
    coronal: [1, 0, 2, "L", "R", "S", "I"],
    sagittal: [0, 1, 2, "P", "A", "S", "I"],
  };
  const HIDDEN = [48, 52, 59];
  const state = { item: 0, plane: "axial", slice: 0 };
  const unpacked = new Map();

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  const { views, shapes, colours, opacity } = data;
  const shape = shapes[views[0].grey];

  const volumesOf = async (index) => {
    if (!unpacked.has(index)) {
      const classes = new Set(views.map((view) => view.classes));
      const pairs = Object.keys(shapes).map(async (name) => {
        const bytes = await unpack(data.items[index][name]);
        return [name, classes.has(name) ? new Uint16Array(bytes.buffer) : bytes];
      });
      unpacked.set(index, Object.fromEntries(await Promise.all(pairs)));
    }
    return unpacked.get(index);
  };

  const offset = (shape, place) => (place[0] * shape[1] + place[1]) * shape[2] + place[2];

  const draw = async () => {
    const { item: index, plane, slice } = state;
    const volumes = await volumesOf(index);
    if (index !== state.item || plane !== state.plane || slice !== state.slice) return;
    const [fixed, across, up] = PLANES[plane];
    const mm = data.items[index].spacing;
    const width = shape[across], height = shape[up];
    const place = [0, 0, 0];
    place[fixed] = slice;
    for (const view of views) {
      const canvas = document.getElementById(view.id);
      canvas.width = width;
      canvas.height = height;
      canvas.style.aspectRatio = `${width * mm[across]} / ${height * mm[up]}`;
      const image = new ImageData(width, height), pixels = image.data;
      const source = volumes[view.grey], visible = volumes[view.visible];
      const classes = volumes[view.classes];
      const grid = shapes[view.visible];
      const cell = visible && shape.map((n, axis) => n / grid[axis]);
      for (let row = 0; row < height; row++) {
        place[up] = height - 1 - row;
        for (let column = 0; column < width; column++) {
          place[across] = column;
          const to = 4 * (row * width + column), at = offset(shape, place);
          const grey = source[at], number = classes ? classes[at] : 0;
          const hidden = visible &&
            !visible[offset(grid, place.map((n, axis) => Math.floor(n / cell[axis])))];
          for (let c = 0; c < 3; c++) {
            const mixed = number ? grey + opacity * (colours[number][c] - grey) : grey;
            pixels[to + c] = hidden ? HIDDEN[c] : Math.round(mixed);
          }
          pixels[to + 3] = 255;
        }
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
    }
    viewer.dataset.drawn = `${index} ${plane} ${slice}`;
  };

  const slider = document.getElementById("slice");
  const show = () => {
    const [fixed, , , left, right, top, bottom] = PLANES[state.plane];
    const most = shape[fixed] - 1;
    state.slice = Math.min(Math.max(state.slice, 0), most);
    slider.max = most;
    slider.value = state.slice;
    const word = `${state.plane} slice ${state.slice + 1} of ${most + 1}`;
    document.getElementById("shown").textContent = word;
    slider.setAttribute("aria-valuetext", word);
    for (const button of viewer.querySelectorAll("[data-plane]"))
      button.setAttribute("aria-pressed", button.dataset.plane === state.plane);
    for (const [side, letter] of Object.entries({ left, right, top, bottom }))
      for (const label of viewer.querySelectorAll(`.${side}`)) label.textContent = letter;
    draw().catch((error) => fail(`The volumes in this page are damaged: ${error}`));
  };
  const middle = () => {
    state.slice = Math.floor(shape[PLANES[state.plane][0]] / 2);
    show();
  };

  slider.addEventListener("input", () => { state.slice = Number(slider.value); show(); });
  for (const button of viewer.querySelectorAll("[data-plane]"))
    button.addEventListener("click", () => { state.plane = button.dataset.plane; middle(); });
  const choice = document.getElementById("item");
  choice?.addEventListener("change", () => { state.item = Number(choice.value); show(); });
  const move = (by) => { state.slice += by; show(); };
  viewer.addEventListener("keydown", (event) => {
    if (event.target === slider || event.target === choice) return; // they have their own arrows
    const by = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  });
  for (const canvas of viewer.querySelectorAll("canvas"))
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      move(event.deltaY < 0 ? 1 : -1);
    }, { passive: false });
  note.hidden = true;
  viewer.hidden = false;
  middle();
})();
