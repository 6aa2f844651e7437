/* Draws the points with WebGL2: one program, a buffer of positions and one of colours. */

const VERTEX = `#version 300 es
in vec2 position;
in vec4 colour;
uniform vec2 centre;
uniform vec2 scale;
uniform float size;
out vec4 shade;
void main() {
  gl_Position = vec4((position - centre) * scale, 0.0, 1.0);
  gl_PointSize = size;
  shade = colour;
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec4 shade;
uniform float size;
out vec4 result;
void main() {
  float radius = length(gl_PointCoord - 0.5) * size;
  float cover = clamp(size * 0.5 - radius, 0.0, 1.0);
  if (cover == 0.0) discard;
  result = vec4(shade.rgb, 1.0) * shade.a * cover;
}`;

export class Points {
  /** Throws an Error where there is no WebGL2. */
  constructor(canvas) {
    this.canvas = canvas;
    this.count = 0;
    this.lost = false;
    canvas.addEventListener("webglcontextlost", (event) => { event.preventDefault(); this.lost = true; });
    canvas.addEventListener("webglcontextrestored", () => {
      this.lost = false;
      this.open();
      if (this.positions) this.setPositions(this.positions);
      if (this.colours) this.setColours(this.colours);
      this.onRestored?.();
    });
    this.open();
  }

  open() {
    const gl = this.canvas.getContext("webgl2", {antialias: false, premultipliedAlpha: true});
    if (!gl) throw new Error("this browser has no WebGL2: the map is not drawn, lists and search work without it");
    this.gl = gl;
    const program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`the map's shaders: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    this.uniform = Object.fromEntries(["centre", "scale", "size"].map((name) => [name, gl.getUniformLocation(program, name)]));
    this.buffers = {};
    for (const [name, size, type, normalised] of [["position", 2, gl.FLOAT, false], ["colour", 4, gl.UNSIGNED_BYTE, true]]) {
      const place = gl.getAttribLocation(program, name);
      this.buffers[name] = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, size, type, normalised, 0, 0);
    }
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  upload(name, values) {
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.STATIC_DRAW);
  }

  /** Float32Array, x and y in turn. */
  setPositions(positions) {
    this.positions = positions;
    this.count = positions.length / 2;
    this.upload("position", positions);
  }

  /** Uint8Array, red, green, blue and alpha in turn. */
  setColours(colours) {
    this.colours = colours;
    this.upload("colour", colours);
  }

  /** camera: the place in the middle (x, y) and CSS pixels per unit (scale); size: diameter in CSS pixels. */
  draw(camera, width, height, size) {
    if (this.lost || !this.colours) return;
    const gl = this.gl, ratio = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) [this.canvas.width, this.canvas.height] = [w, h];
    gl.viewport(0, 0, w, h);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform2f(this.uniform.centre, camera.x, camera.y);
    gl.uniform2f(this.uniform.scale, 2 * camera.scale / width, 2 * camera.scale / height);
    gl.uniform1f(this.uniform.size, size * ratio);
    gl.drawArrays(gl.POINTS, 0, this.count);
  }
}
