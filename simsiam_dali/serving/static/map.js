/* The map: camera, pointer and keyboard, and what is marked on it. Points are drawn by points.js. */

import {Grid} from "./grid.js";
import {Points} from "./points.js";

const MARGIN = 24;
const REACH = 12; // CSS pixels around the pointer in which a song counts as pointed at
const CLICK = 4; // CSS pixels that a click may move

export class SongMap {
  /** stage: the element that holds the canvases; label(song): [title, artist]; onSelect(song). */
  constructor(stage, {label, onSelect}) {
    this.stage = stage;
    this.label = label;
    this.onSelect = onSelect;
    this.marks = stage.querySelector("#marks");
    this.tip = stage.querySelector("#tip");
    this.pen = this.marks.getContext("2d");
    this.points = new Points(stage.querySelector("#points"));
    this.points.onRestored = () => this.draw();
    this.camera = {x: 0, y: 0, scale: 1};
    this.songs = new Float32Array(0);
    this.grid = null;
    this.hovered = this.selected = this.playing = -1;
    this.lines = {kind: "none", songs: []}; // "star": from the selected song to each; "way": from one to the next
    this.waiting = false;
    this.pointers = new Map();
    this.listen();
  }

  /** Positions in -1..1; the first ones show the whole map. */
  setPositions(positions) {
    const first = !this.songs.length;
    this.songs = positions;
    this.grid = new Grid(positions);
    this.points.setPositions(positions);
    if (first) this.whole();
    else this.draw();
  }

  setColours(colours) {
    this.points.setColours(colours);
    this.draw();
  }

  whole() {
    const {width, height} = this.size();
    this.fit = Math.max(10, Math.min(width, height) / 2 - MARGIN);
    this.camera = {x: 0, y: 0, scale: this.fit};
    this.draw();
  }

  /** Mark a song; `lines` connects it to others. */
  select(song, lines = {kind: "none", songs: []}) {
    this.selected = song;
    this.lines = lines;
    this.draw();
  }

  setPlaying(song) {
    this.playing = song;
    this.draw();
  }

  /** Move so that a song is in sight, where it is not. */
  show(song) {
    const [x, y] = this.toScreen(song), {width, height} = this.size();
    if (x < MARGIN || y < MARGIN || x > width - MARGIN || y > height - MARGIN) {
      this.camera.x = this.songs[2 * song];
      this.camera.y = this.songs[2 * song + 1];
      this.draw();
    }
  }

  size() {
    return {width: this.stage.clientWidth, height: this.stage.clientHeight};
  }

  /** CSS pixels of a song from the stage's upper left corner. */
  toScreen(song) {
    const {width, height} = this.size(), {x, y, scale} = this.camera;
    return [width / 2 + (this.songs[2 * song] - x) * scale, height / 2 - (this.songs[2 * song + 1] - y) * scale];
  }

  toMap(left, top) {
    const {width, height} = this.size(), {x, y, scale} = this.camera;
    return [x + (left - width / 2) / scale, y - (top - height / 2) / scale];
  }

  songAt(left, top, reach = REACH) {
    return this.grid ? this.grid.nearest(...this.toMap(left, top), reach / this.camera.scale) : -1;
  }

  /** Zoom by a factor; the place at (left, top) stays. */
  zoom(factor, left, top) {
    const [x, y] = this.toMap(left, top);
    this.camera.scale = Math.min(this.fit * 4000, Math.max(this.fit / 4, this.camera.scale * factor));
    const [movedX, movedY] = this.toMap(left, top);
    this.camera.x += x - movedX;
    this.camera.y += y - movedY;
    this.draw();
  }

  pan(dx, dy) {
    this.camera.x -= dx / this.camera.scale;
    this.camera.y += dy / this.camera.scale;
    this.draw();
  }

  /** Draw at the next frame, once. */
  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.drawNow();
    });
  }

  drawNow() {
    const {width, height} = this.size();
    const n = this.songs.length / 2;
    const small = n > 30000 ? 3 : n > 5000 ? 4.5 : n > 800 ? 7 : 10;
    const dot = small * Math.min(3, Math.max(0.8, (this.camera.scale / (this.fit || 1)) ** 0.35));
    this.points.draw(this.camera, width, height, dot);
    this.drawMarks(width, height, dot);
  }

  drawMarks(width, height, dot) {
    const ratio = window.devicePixelRatio || 1, pen = this.pen;
    this.marks.width = Math.round(width * ratio);
    this.marks.height = Math.round(height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const style = getComputedStyle(this.stage);
    const mark = style.getPropertyValue("--mark"), accent = style.getPropertyValue("--accent");
    if (this.lines.songs.length) {
      pen.strokeStyle = accent;
      pen.lineWidth = this.lines.kind === "way" ? 2 : 1;
      pen.beginPath();
      this.lines.songs.forEach((song, i) => {
        if (this.lines.kind === "star") pen.moveTo(...this.toScreen(this.selected));
        if (this.lines.kind === "way" && i === 0) pen.moveTo(...this.toScreen(song));
        else pen.lineTo(...this.toScreen(song));
      });
      pen.stroke();
      for (const song of this.lines.songs) this.ring(song, dot / 2 + 2, accent, 1.5);
    }
    if (this.hovered >= 0) this.ring(this.hovered, dot / 2 + 3, mark, 1.5);
    if (this.selected >= 0) this.ring(this.selected, dot / 2 + 4, mark, 2.5);
    if (this.playing >= 0) {
      this.ring(this.playing, dot / 2 + 8, accent, 3);
    }
  }

  ring(song, radius, colour, width) {
    this.pen.strokeStyle = colour;
    this.pen.lineWidth = width;
    this.pen.beginPath();
    this.pen.arc(...this.toScreen(song), radius, 0, 2 * Math.PI);
    this.pen.stroke();
  }

  hover(song) {
    this.marks.classList.toggle("on-song", song >= 0);
    this.tip.hidden = song < 0;
    if (song >= 0) {
      const [title, artist] = this.label(song);
      const by = document.createElement("small");
      by.textContent = artist;
      this.tip.replaceChildren(title, by);
      const [left, top] = this.toScreen(song), {width} = this.size();
      const toLeft = left > width / 2;
      this.tip.style.left = toLeft ? "" : `${left + 14}px`;
      this.tip.style.right = toLeft ? `${width - left + 14}px` : "";
      this.tip.style.top = `${Math.max(4, top - 12)}px`;
    }
    if (song === this.hovered) return;
    this.hovered = song;
    this.draw();
  }

  listen() {
    new ResizeObserver(() => (this.fit && this.camera.scale === this.fit ? this.whole() : this.draw())).observe(this.stage);
    const canvas = this.marks;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...place(event));
    }, {passive: false});
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, place(event));
      this.moved = this.pointers.size > 1 ? Infinity : 0;
    });
    canvas.addEventListener("pointermove", (event) => this.pointerMoved(event.pointerId, place(event)));
    canvas.addEventListener("pointerup", (event) => {
      const wasDown = this.pointers.delete(event.pointerId);
      canvas.classList.remove("dragged");
      if (!wasDown || this.moved > CLICK) return;
      const song = this.songAt(...place(event));
      if (song >= 0) this.onSelect(song, true);
    });
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.hover(-1));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  pointerMoved(id, [left, top]) {
    const before = this.pointers.get(id);
    if (!before) {
      this.hover(this.songAt(left, top));
      return;
    }
    const other = [...this.pointers].find(([key]) => key !== id)?.[1];
    this.pointers.set(id, [left, top]);
    if (other) { // two fingers: the distance between them is the zoom
      const [old, now] = [before, [left, top]].map(([x, y]) => Math.hypot(x - other[0], y - other[1]));
      this.zoom(now / Math.max(1, old), (left + other[0]) / 2, (top + other[1]) / 2);
      return;
    }
    this.moved += Math.hypot(left - before[0], top - before[1]);
    if (this.moved > CLICK) {
      this.marks.classList.add("dragged");
      this.hover(-1);
      this.pan(left - before[0], top - before[1]);
    }
  }

  key(event) {
    const {width, height} = this.size(), step = 60;
    const moves = {ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step]};
    const zooms = {"+": 1.4, "=": 1.4, "-": 1 / 1.4};
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) this.pan(...moves[event.key]);
    else if (zooms[event.key]) this.zoom(zooms[event.key], width / 2, height / 2);
    else if (event.key === "Enter") {
      const song = this.songAt(width / 2, height / 2, Math.max(width, height));
      if (song >= 0) this.onSelect(song, true);
    } else return;
    event.preventDefault();
  }
}
