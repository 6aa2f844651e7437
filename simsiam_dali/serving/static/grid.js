/* A uniform grid over the map, to find the song nearest to a place without looking at all of them. */

const SIDE = 256;
const cellOf = (value) => Math.max(0, Math.min(SIDE - 1, Math.floor((value + 1) / 2 * SIDE)));

export class Grid {
  /** points: Float32Array of x and y in turn, in -1..1. */
  constructor(points) {
    this.points = points;
    const n = points.length / 2;
    this.start = new Uint32Array(SIDE * SIDE + 1);
    const cell = new Uint32Array(n);
    for (let i = 0; i < n; i++) {
      cell[i] = cellOf(points[2 * i + 1]) * SIDE + cellOf(points[2 * i]);
      this.start[cell[i] + 1]++;
    }
    for (let c = 0; c < SIDE * SIDE; c++) this.start[c + 1] += this.start[c];
    const next = this.start.slice(0, -1);
    this.songs = new Uint32Array(n);
    for (let i = 0; i < n; i++) this.songs[next[cell[i]]++] = i;
  }

  /** The song nearest to (x, y) of those within `radius`, -1 for none. */
  nearest(x, y, radius) {
    let best = -1, least = radius * radius;
    const lastColumn = cellOf(x + radius), lastRow = cellOf(y + radius);
    for (let row = cellOf(y - radius); row <= lastRow; row++) {
      for (let column = cellOf(x - radius); column <= lastColumn; column++) {
        const c = row * SIDE + column;
        for (let k = this.start[c]; k < this.start[c + 1]; k++) {
          const song = this.songs[k];
          const dx = this.points[2 * song] - x, dy = this.points[2 * song + 1] - y;
          if (dx * dx + dy * dy < least) {
            least = dx * dx + dy * dy;
            best = song;
          }
        }
      }
    }
    return best;
  }
}
