// The slice on its canvas: which z, what contrast, how large, which marks. Knows sources and motors, no requests.

import { autoContrast, paint } from "./contrast.js";
import { markOf, scaleBar, ticks } from "./marks.js";
import { depthOf, placeOf } from "./motors.js";

const WHEEL_STEP = 50; // a notch of a mouse's wheel is more, a trackpad's events are much less

export class View {
  /** `parts`: stage, sheet, canvas, overlay, ticks; `on`: z(z), contrast({low, high, least, most}), read(error or null). */
  constructor(parts, on) {
    Object.assign(this, { ...parts, on, source: null, z: 0, motors: [], selected: null, spacing: null, zoom: "fit" });
    this.wheel = 0;
    this.stage.addEventListener("wheel", (event) => this.#turn(event), { passive: false });
    this.stage.addEventListener("keydown", (event) => this.#press(event));
    new ResizeObserver(() => this.#arrange()).observe(this.stage);
  }

  /** Show `source` from its middle slice, without motors. */
  async open(source) {
    Object.assign(this, { source, motors: [], selected: null, values: null, contrast: null, shownZ: null });
    delete this.canvas.dataset.z;
    this.resize(source.width, source.height, source.depth);
    await this.go(Math.floor(source.depth / 2));
  }

  /** For a source whose size becomes known late. */
  resize(width, height, depth) {
    Object.assign(this.source, { width, height, depth });
    [this.canvas.width, this.canvas.height] = [width, height];
    this.#arrange();
  }

  /** Show slice `z`, or the nearest there is. */
  async go(z) {
    this.z = Math.min(Math.max(Math.round(z), 0), this.source.depth - 1);
    this.on.z(this.z);
    this.#mark();
    await this.#load();
  }

  show({ motors = this.motors, selected = this.selected, spacing = this.spacing }) {
    Object.assign(this, { motors, selected, spacing });
    if (this.source) this.#mark();
  }

  setContrast(low, high) {
    Object.assign(this.contrast, { low, high });
    this.#paint();
  }

  /** From the slice that is shown, so that scrolling does not make the picture flicker. */
  autoContrast() {
    if (!this.values) return;
    this.contrast = autoContrast(this.values);
    this.on.contrast(this.contrast);
    this.#paint();
  }

  setZoom(zoom) {
    this.zoom = zoom;
    this.#arrange();
    this.centre();
  }

  /** Bring the selected motor to the middle, where the sheet is larger than the stage. */
  centre() {
    const motor = this.motors.find(({ rank }) => rank === this.selected);
    const [x, y] = motor ? [motor.x, motor.y] : [this.canvas.width / 2, this.canvas.height / 2];
    this.stage.scrollTo(x * this.scale - this.stage.clientWidth / 2, y * this.scale - this.stage.clientHeight / 2);
  }

  /** The voxel below the pointer, `{y, x, value}`; null outside. */
  at(event) {
    if (!this.source) return null;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [Math.floor((event.clientX - box.left) / this.scale), Math.floor((event.clientY - box.top) / this.scale)];
    if (x < 0 || y < 0 || x >= this.source.width || y >= this.source.height) return null;
    return { y, x, value: this.values?.[y * this.source.width + x] };
  }

  /** Read the slice asked for last; those passed by while reading are left out. */
  async #load() {
    if (!this.source.read || this.loading === this.source) return;
    const source = (this.loading = this.source);
    while (this.source === source && this.shownZ !== this.z) {
      const z = this.z;
      const read = await source.read(z).then((values) => ({ values }), (error) => ({ values: null, error }));
      if (this.source !== source) return;
      Object.assign(this, { values: read.values, shownZ: z });
      this.on.read(read.error ?? null);
      if (this.contrast || !this.values) this.#paint();
      else this.autoContrast();
    }
    this.loading = null;
  }

  /** A slice that could not be read is left empty. */
  #paint() {
    const image = new ImageData(this.source.width, this.source.height);
    if (this.values) paint(this.values, this.contrast, image.data);
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    this.canvas.dataset.z = this.shownZ;
  }

  #arrange() {
    this.sheet.hidden = !this.source?.width; // of a remote tomogram nothing is known at first
    if (this.sheet.hidden) return;
    const { width, height } = this.source;
    const box = this.stage.getBoundingClientRect(); // not clientHeight, which rounds up: a scroll bar would come and go
    const fitting = Math.min(Math.floor(box.width) / width, Math.floor(box.height) / height);
    this.scale = this.zoom === "fit" ? fitting : Number(this.zoom);
    this.sheet.style.width = `${Math.floor(width * this.scale)}px`;
    this.sheet.style.height = `${Math.floor(height * this.scale)}px`;
    this.canvas.classList.toggle("pixels", this.scale >= 2);
    this.#mark();
  }

  #mark() {
    if (this.sheet.hidden) return;
    const { scale, spacing, selected, source } = this;
    const [sheetWidth, sheetHeight] = [source.width * scale, source.height * scale];
    const marked = this.#marked();
    // The selected one is drawn last, above the others.
    const order = [...marked].sort((a, b) => (a.motor.rank === selected) - (b.motor.rank === selected));
    const marks = order.map(({ motor, depth }) => markOf(motor, { scale, sheetWidth, depth, selected: motor.rank === selected }));
    if (spacing) marks.push(scaleBar({ scale, spacing, sheetWidth, sheetHeight }));
    this.overlay.replaceChildren(...marks);
    this.ticks.replaceChildren(...ticks(this.motors, source.depth, selected));
    this.canvas.setAttribute("aria-label", this.#inWords(marked.filter(({ depth }) => depth === "near")));
  }

  /** Where no pixels are to be seen, all motors are shown at once, those of other slices as from the side. */
  #marked() {
    const depthAt = (motor) => depthOf(motor, this.z, this.spacing) ?? (this.source.kind === "remote" ? "far" : null);
    return this.motors.map((motor) => ({ motor, depth: depthAt(motor) })).filter(({ depth }) => depth !== null);
  }

  #inWords(near) {
    const { name, width, height, depth } = this.source;
    const what = depth > 1 ? `Slice z ${this.z} of 0 to ${depth - 1} of ${name}` : `Image ${name}`;
    const found = near.map(({ motor }) => `number ${motor.rank}, score ${motor.score.toFixed(2)}, at ${placeOf(motor, depth > 1)}`);
    const marks = `${near.length || "no"} motor${near.length === 1 ? "" : "s"} marked`;
    return `${what}, ${height} by ${width} voxels in y and x; ${[marks, ...found].join("; ")}`;
  }

  #turn(event) {
    if (!this.source || this.source.depth < 2 || event.ctrlKey) return; // with Ctrl the browser zooms
    event.preventDefault();
    const turned = event.deltaY || event.deltaX; // with Shift some browsers turn it sideways
    const delta = turned * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 20);
    this.wheel = Math.sign(delta) === Math.sign(this.wheel) ? this.wheel + delta : delta;
    if (Math.abs(this.wheel) < WHEEL_STEP) return;
    this.go(this.z - Math.sign(this.wheel) * (event.shiftKey ? 10 : 1)); // up is up in z
    this.wheel = 0;
  }

  #press(event) {
    if (!this.source || event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.source.depth - 1;
    const z = { ArrowUp: this.z + 1, ArrowDown: this.z - 1, PageUp: this.z + 10, PageDown: this.z - 10, Home: 0, End: last }[event.key];
    if (z === undefined) return;
    event.preventDefault();
    this.go(z);
  }
}
