// The heat map: a cell for each expert of each layer (or each layer, where whole layers are placed), coloured by how many
// nodes hold it. Cells keep their elements, so what changes fades from one colour to the next.
import { el, plural, svg, tail } from "./app.js";

const CELL_MAX = 22;
const CELL_MIN = 5;
const ROOM = { left: 26, top: 16 };

export class Heat {
  constructor(place, map, { still = false, holder = null } = {}) {
    this.place = place;
    this.still = still;
    this.holder = holder;
    this.at = null;
    this.detail = el("p", { class: "detail", role: "status", "aria-live": "polite" });
    this.box = el("div", { class: "heat-box" });
    place.replaceChildren(this.box, ...(still ? [] : [this.detail]));
    this.draw(map);
    new ResizeObserver(() => this.resize()).observe(place);
  }

  /** layers × experts -> the set of places in map.workers that hold it; null where nothing belongs. */
  static cells(map) {
    const rows = Array.from({ length: map.layers }, () => Array(Math.max(1, map.experts)).fill(null));
    for (const shard of map.shards) {
      if (shard.kind === "trunk") continue;
      const experts = shard.kind === "stage" || !shard.experts.length ? rows[0].keys() : shard.experts;
      for (const expert of [...experts]) {
        for (let layer = shard.first_layer; layer <= shard.last_layer; layer++) {
          const cell = (rows[layer][expert] ??= new Set());
          for (const holder of shard.holders) cell.add(holder);
        }
      }
    }
    return rows;
  }

  draw(map) {
    this.map = map;
    this.grid = Heat.cells(map);
    this.wide = map.experts > map.layers; // the longer side lies down
    this.columns = this.wide ? map.experts : map.layers;
    this.lines = this.wide ? map.layers : map.experts;
    const attributes = { class: "heat", role: "img" };
    if (!this.still) Object.assign(attributes, { tabindex: 0, "aria-roledescription": "heat map" });
    this.picture = svg("svg", attributes);
    this.rects = new Map();
    for (let line = 0; line < this.lines; line++) {
      for (let column = 0; column < this.columns; column++) {
        const rect = svg("rect", {});
        rect.dataset.at = `${line},${column}`;
        this.rects.set(`${line},${column}`, rect);
        this.picture.append(rect);
      }
    }
    this.labels = svg("g", { "aria-hidden": true });
    this.cursor = svg("rect", { class: "cursor", visibility: "hidden" });
    this.picture.append(this.labels, this.cursor);
    this.box.replaceChildren(this.picture);
    if (!this.still) this.listen();
    this.resize();
    this.paint();
  }

  listen() {
    this.picture.addEventListener("pointermove", (event) => event.target.dataset.at && this.show(event.target.dataset.at));
    this.picture.addEventListener("pointerdown", (event) => event.target.dataset.at && this.show(event.target.dataset.at));
    this.picture.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [line, column] = (this.at ?? "0,-1").split(",").map(Number);
      const to = [Math.min(this.lines - 1, Math.max(0, line + step[0])), Math.min(this.columns - 1, Math.max(0, column + step[1]))];
      this.show(to.join(","));
    });
  }

  update(map) {
    const same = map.id === this.map.id && map.layers === this.map.layers && map.experts === this.map.experts;
    if (!same) return this.draw(map);
    this.map = map;
    this.grid = Heat.cells(map);
    this.paint();
    if (this.at && !this.still) this.show(this.at);
  }

  /** Only what this node holds stands out; null: everything. */
  only(peerId) {
    this.holder = peerId;
    this.paint();
  }

  resize() {
    const width = this.place.clientWidth - ROOM.left - 12;
    if (width <= 0) return;
    const size = Math.max(CELL_MIN, Math.min(this.still ? 14 : CELL_MAX, Math.floor(width / this.columns)));
    const gap = size > 9 ? 2 : 1;
    // few lines make low pictures: their cells are higher than wide
    const high = Math.max(size, Math.min(this.still ? 26 : 56, Math.floor((this.still ? 150 : 280) / this.lines)));
    this.size = size;
    this.high = high;
    for (const [at, rect] of this.rects) {
      const [line, column] = at.split(",").map(Number);
      for (const [key, value] of Object.entries({
        x: ROOM.left + column * size, y: ROOM.top + line * high, width: size - gap, height: high - gap, rx: size > 9 ? 2 : 0,
      })) rect.setAttribute(key, value);
    }
    this.picture.setAttribute("width", ROOM.left + this.columns * size);
    this.picture.setAttribute("height", ROOM.top + this.lines * high);
    this.label(size, high);
    if (this.at) this.mark();
  }

  label(size, high) {
    const marks = [];
    const across = [1, 2, 4, 8, 16, 32, 64].find((step) => step * size >= 22) ?? 64;
    for (let column = 0; column < this.columns; column += across) {
      marks.push(svg("text", { x: ROOM.left + column * size, y: 10 }, String(column)));
    }
    const down = Math.max(1, Math.ceil(13 / high));
    for (let line = 0; line < this.lines; line += down) {
      marks.push(svg("text", { x: ROOM.left - 6, y: ROOM.top + line * high + (high - 2) / 2 + 3.5, "text-anchor": "end" }, String(line)));
    }
    this.labels.replaceChildren(...marks);
  }

  cell(at) {
    const [line, column] = at.split(",").map(Number);
    const [layer, expert] = this.wide ? [line, column] : [column, line];
    return { layer, expert, holders: this.grid[layer]?.[expert] ?? null };
  }

  paint() {
    const wanted = this.holder === null ? -1 : this.map.workers.indexOf(this.holder);
    let missing = 0;
    let cells = 0;
    let least = Infinity;
    let most = 0;
    for (const [at, rect] of this.rects) {
      const { holders } = this.cell(at);
      if (holders !== null) {
        cells += 1;
        missing += holders.size === 0;
        least = Math.min(least, holders.size);
        most = Math.max(most, holders.size);
      }
      const heat = holders === null ? "none" : `h${Math.min(4, holders.size)}`;
      const dim = this.holder !== null && !holders?.has(wanted);
      rect.setAttribute("class", dim ? `${heat} dim` : heat);
    }
    const told = cells ? `Each expert is on ${least === most ? least : `${least} to ${most}`} of ${plural(this.map.workers.length, "node")}${missing ? `; nobody has ${missing} of ${cells}` : ""}.` : "Nothing is placed.";
    this.picture.setAttribute("aria-label", `${this.map.model}: ${this.map.layers} layers, ${this.map.experts} experts. ${told}${this.still ? "" : " Arrow keys move through it."}`);
    if (!this.still && !this.at) this.detail.textContent = told;
  }

  mark() {
    const [line, column] = this.at.split(",").map(Number);
    const attributes = { x: ROOM.left + column * this.size - 1, y: ROOM.top + line * this.high - 1, width: this.size, height: this.high, rx: 3, visibility: "visible" };
    for (const [key, value] of Object.entries(attributes)) this.cursor.setAttribute(key, value);
  }

  show(at) {
    this.at = at;
    const { layer, expert, holders } = this.cell(at);
    this.mark();
    const names = holders === null ? [] : [...holders].map((place) => tail(this.map.workers[place]));
    const what = holders === null ? "has no experts" : holders.size ? `on ${plural(holders.size, "node")}` : "nobody holds it";
    this.detail.replaceChildren(
      el("b", {}, `Layer ${layer}, expert ${expert}`), el("span", {}, what), ...names.map((name) => el("code", {}, name)),
    );
  }
}
