/* The songs and the search in them, all in memory: rows of the table, from 0. */

const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

export class Songs {
  /** data: the answer of /api/songs. */
  constructor(data) {
    this.data = data;
    this.count = data.title.length;
    this.texts = null;
  }

  title(song) {
    return this.data.title[song];
  }

  artist(song) {
    return this.data.artist[song] || "unknown artist";
  }

  /** Album, year, genre and rating in one line. */
  about(song) {
    const {album, year, genre} = this.data;
    return [this.artist(song), album[song], year[song], genre[song]].filter(Boolean).join(" · ");
  }

  /** Songs whose tags hold every word, in any order; titles that begin with the text first. */
  find(text) {
    const {title, artist, album, genre} = this.data;
    this.texts ??= title.map((own, song) => plain(`${own}\n${artist[song]}\n${album[song]}\n${genre[song]}`));
    const whole = plain(text.trim()), words = whole.split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const found = [], first = [];
    for (let song = 0; song < this.count; song++) {
      const own = this.texts[song];
      if (words.every((word) => own.includes(word))) (own.startsWith(whole) ? first : found).push(song);
    }
    return first.concat(found);
  }
}
