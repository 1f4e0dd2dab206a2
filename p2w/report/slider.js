// Leafs through the volumes of the page: whole, scale of the part, plane and slice; the choice stands in the address.
"use strict";
(() => {
  const root = document.getElementById("slider");
  const source = document.getElementById("volumes");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent);
  const [D, H, W] = data.shape;
  const at = (name) => root.querySelector(`[name=${name}]`);
  const planes = {
    // rows, columns, slices; voxel (z, y, x) of row r and column c in slice s; edges of the picture, axes z y x
    axial: { size: [H, W, D], voxel: (r, c, s) => [s, r, c], edges: [1, 2] },
    coronal: { size: [D, W, H], voxel: (r, c, s) => [D - 1 - r, s, c], edges: [0, 2] },
    sagittal: { size: [D, H, W], voxel: (r, c, s) => [D - 1 - r, c, s], edges: [0, 1] },
  };
  const choice = { whole: 0, scale: 0, plane: "axial", slice: 0 };
  const unpacked = new Map();

  // base64 -> zlib -> differences along a row -> voxels
  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const voxels = new Uint8Array(await new Response(stream).arrayBuffer());
    for (let i = 0; i < voxels.length; i++) if (i % W) voxels[i] += voxels[i - 1];
    return voxels;
  }

  function volume(kind) {
    const { whole, scale } = choice;
    const name = kind === "whole" ? `${kind} ${whole}` : `${kind} ${whole} ${scale}`;
    const text = kind === "whole" ? data.whole[whole] : data[kind][whole][scale];
    if (!unpacked.has(name)) unpacked.set(name, unpack(text));
    return unpacked.get(name);
  }

  function paint(canvas, voxels, shown) {
    const plane = planes[shown.plane];
    const [rows, columns] = plane.size;
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d", { willReadFrequently: true }); // drawn by the CPU, never by a GPU
    const image = context.createImageData(columns, rows);
    for (let r = 0, i = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++, i += 4) {
        const [z, y, x] = plane.voxel(r, c, shown.slice);
        const grey = voxels[(z * H + y) * W + x];
        image.data[i] = image.data[i + 1] = image.data[i + 2] = grey;
        image.data[i + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    const [high, wide] = plane.edges.map((axis) => data.extent[shown.whole][axis]);
    canvas.style.aspectRatio = `${wide} / ${high}`;
    canvas.style.width = `min(100%, ${(26 * wide) / high}rem)`;
    const kind = canvas.dataset.kind;
    canvas.setAttribute("aria-label", `${kind}, ${shown.plane} slice ${shown.slice + 1}`);
  }

  // Mean squared error of the shown slice and of the volume, grey 255 being 1.
  function errors(output, whole, shown) {
    const plane = planes[shown.plane];
    const [rows, columns] = plane.size;
    let all = 0, slice = 0;
    for (let i = 0; i < whole.length; i++) all += (output[i] - whole[i]) ** 2;
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) {
        const [z, y, x] = plane.voxel(r, c, shown.slice);
        const i = (z * H + y) * W + x;
        slice += (output[i] - whole[i]) ** 2;
      }
    }
    const scaled = (sum, count) => (sum / count / 65025).toFixed(4);
    return `mean squared error: this slice ${scaled(slice, rows * columns)}, the volume ${scaled(all, whole.length)}`;
  }

  async function show() {
    const shown = { ...choice };
    const last = planes[shown.plane].size[2] - 1;
    at("whole").value = shown.whole;
    at("scale").value = shown.scale;
    at("slice").max = last;
    at("slice").value = shown.slice;
    at("slice").setAttribute("aria-valuetext", `${shown.plane} slice ${shown.slice + 1} of ${last + 1}`);
    for (const button of root.querySelectorAll("[name=plane]")) button.checked = button.value === shown.plane;
    root.querySelector("output").textContent = `${shown.slice + 1} of ${last + 1}`;
    const [part, output, whole] = await Promise.all([volume("part"), volume("output"), volume("whole")]);
    if (JSON.stringify(shown) !== JSON.stringify(choice)) return; // a later choice came in between
    for (const [kind, voxels] of [["part", part], ["output", output], ["whole", whole]])
      paint(root.querySelector(`canvas[data-kind=${kind}]`), voxels, shown);
    root.querySelector(".error").textContent = errors(output, whole, shown);
    root.querySelector(".key").textContent = data.keys[shown.whole];
    root.dataset.drawn = new URLSearchParams(shown).toString();
  }

  function choose(next) {
    const index = (value, count, otherwise) => {
      const number = Number.parseInt(value, 10);
      return number >= 0 ? Math.min(number, count - 1) : otherwise;
    };
    const plane = Object.hasOwn(planes, next.plane ?? "") ? next.plane : choice.plane;
    const slices = planes[plane].size[2];
    const turned = plane !== choice.plane && next.slice === undefined;
    choice.plane = plane;
    choice.whole = index(next.whole, data.whole.length, choice.whole);
    choice.scale = index(next.scale, data.scale.length, choice.scale);
    choice.slice = turned ? slices >> 1 : Math.min(index(next.slice, slices, choice.slice), slices - 1);
    show().catch((error) => {
      root.querySelector(".error").textContent = `cannot be shown: ${error}`;
    });
  }

  const fromAddress = () => choose(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  root.addEventListener("input", (event) => {
    choose({ [event.target.name]: event.target.value });
    try {
      history.replaceState(null, "", `#${new URLSearchParams(choice)}`);
    } catch {} // where the browser keeps the address of a file to itself
  });
  addEventListener("hashchange", fromAddress);
  choice.slice = D >> 1;
  choice.scale = data.scale.length - 1;
  root.hidden = false;
  fromAddress();
})();
