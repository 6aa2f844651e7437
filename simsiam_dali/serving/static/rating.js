/* The rating of the selected song: buttons 0 to 5, which the keys 0 to 5 press too. */

import {rate} from "./api.js";
import {at, attempt, element} from "./page.js";

const STARS = [0, 1, 2, 3, 4, 5];

export class Rating {
  /** onRated(song): its rating has changed. */
  constructor(songs, onRated) {
    this.songs = songs;
    this.onRated = onRated;
    this.song = -1;
    this.buttons = STARS.map((stars) => {
      const button = element("button", {type: "button", "aria-label": `${stars} of 5`, title: `Key ${stars}`}, `${stars}`);
      button.addEventListener("click", () => this.give(this.song, stars));
      return button;
    });
    this.none = element("button", {type: "button", title: "Key Delete"}, "Remove");
    this.none.addEventListener("click", () => this.give(this.song, null));
    this.text = element("span", {role: "status"});
    at("rating").replaceChildren(...this.buttons, this.none, this.text);
  }

  show(song) {
    this.song = song;
    const rating = this.songs.data.rating[song] ?? null;
    this.buttons.forEach((button, stars) => {
      button.setAttribute("aria-pressed", String(rating !== null && Math.round(rating * 5) === stars));
    });
    this.text.textContent = rating === null ? "not rated" : `${+(rating * 5).toFixed(1)} of 5`;
    this.none.hidden = rating === null;
  }

  /** stars: 0 to 5, or null for a song that is to be unrated. */
  give(song, stars) {
    if (song < 0) return Promise.resolve();
    return attempt(async () => {
      const {rating} = await rate(song, stars === null ? null : stars / 5);
      this.songs.data.rating[song] = rating;
      if (song === this.song) this.show(song);
      this.onRated(song);
    });
  }
}
