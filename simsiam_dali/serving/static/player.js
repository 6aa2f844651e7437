/* The queue and the audio element: plays on to the end of the queue, and like a radio beyond it where that is asked. */

import {audioUrl} from "./api.js";

const MOST_FAILURES = 5; // in a row: with the music's disk away no song plays, and a radio has no end

export class Player extends EventTarget {
  /** audio: the element; more(last, songs): a promise of songs that follow, for a radio. */
  constructor(audio, more) {
    super();
    this.audio = audio;
    this.more = more;
    this.queue = [];
    this.place = -1;
    this.isRadio = false;
    this.failures = 0; // songs in a row that did not play
    this.generation = 0; // of the queue: what was asked for an earlier one is dropped
    this.asking = -1; // the generation that more songs are asked for
    audio.addEventListener("ended", () => this.step(1));
    audio.addEventListener("error", () => this.failed());
    audio.addEventListener("playing", () => { this.failures = 0; });
    for (const name of ["play", "pause", "timeupdate", "durationchange", "emptied"]) {
      audio.addEventListener(name, () => this.dispatchEvent(new Event("time")));
    }
  }

  get song() {
    return this.place < 0 ? -1 : this.queue[this.place];
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  /** Play songs instead of the queue. */
  play(songs, isRadio = false) {
    this.generation++;
    this.queue = [...songs];
    this.isRadio = isRadio;
    this.start(0);
  }

  /** Play a song at once; the queue goes on after it. */
  playNow(song) {
    this.queue.splice(this.place + 1, 0, song);
    this.start(this.place + 1);
  }

  /** Add songs at the end. */
  add(songs) {
    this.queue.push(...songs);
    this.changed();
  }

  remove(place) {
    this.queue.splice(place, 1);
    if (place === this.place) {
      if (place < this.queue.length) this.start(place);
      else this.stop();
      return;
    }
    if (place < this.place) this.place--;
    this.changed();
  }

  clear() {
    this.generation++;
    this.queue = [];
    this.isRadio = false;
    this.stop();
  }

  stop() {
    this.place = -1;
    this.audio.pause();
    this.audio.removeAttribute("src");
    this.audio.load();
    this.changed();
  }

  start(place) {
    this.place = place;
    this.load(false);
    this.changed();
    if (this.isRadio && this.queue.length - place <= 3) this.extend();
  }

  load(asWav) {
    this.asWav = asWav;
    this.audio.src = audioUrl(this.song, asWav);
    // A rejected play() is told by the element's error event, or was overtaken by another song.
    this.audio.play().catch((error) => {
      if (error.name === "NotAllowedError") this.dispatchEvent(new CustomEvent("problem", {detail: "press play to begin"}));
    });
  }

  async extend() {
    const own = this.generation;
    if (this.asking === own) return;
    this.asking = own;
    try {
      const songs = await this.more(this.queue.at(-1), this.queue);
      if (own === this.generation) this.add(songs);
    } catch (error) {
      if (own === this.generation) this.dispatchEvent(new CustomEvent("problem", {detail: error.message}));
    } finally {
      if (this.asking === own) this.asking = -1;
    }
  }

  step(by) {
    const place = this.place + by;
    if (by < 0 && (this.audio.currentTime > 3 || place < 0)) this.audio.currentTime = 0;
    else if (place >= 0 && place < this.queue.length) this.start(place);
  }

  toggle() {
    if (this.place < 0) {
      if (this.queue.length) this.start(0);
    } else if (this.audio.paused) this.audio.play().catch(() => this.failed());
    else this.audio.pause();
  }

  /** A format that this browser does not play is asked for once more, as WAV; then the next song comes. */
  async failed() {
    if (this.place < 0 || !this.audio.error) return;
    if (!this.asWav && this.audio.error.code >= MediaError.MEDIA_ERR_DECODE) {
      this.load(true);
      return;
    }
    const {place, generation} = this;
    const reason = await fetch(audioUrl(this.song, false), {method: "HEAD"}).then(
      (answer) => (answer.status === 404 ? "its file is missing, or outside the music folder" : "it cannot be played"),
      () => "the server does not answer",
    );
    if (generation !== this.generation || place !== this.place) return; // something else was chosen meanwhile
    const stops = ++this.failures >= MOST_FAILURES;
    if (stops) this.failures = 0; // for what is chosen next
    const detail = stops ? `${reason}; stopped after ${MOST_FAILURES} songs in a row that did not play` : reason;
    this.dispatchEvent(new CustomEvent("problem", {detail, cancelable: true}));
    if (!stops && place + 1 < this.queue.length && reason !== "the server does not answer") this.start(place + 1);
  }
}
