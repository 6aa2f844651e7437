/* Lists of songs as real lists of buttons, which the map's selection is mirrored in. */

import {clock, element} from "./page.js";

export const MOST = 200; // rows shown of a list

/**
 * Fill an <ol>. songs: the library; rows: its songs; value(song, place): the text at the right; onPick(song, place);
 * extra: [text, label(title), action(song, place)] of a second button; current: the place of the playing song.
 */
export function fill(list, songs, rows, {value, onPick, extra, current = -1}) {
  const item = (song, place) => {
    const title = songs.title(song);
    const texts = [element("span", {className: "title"}, title), element("span", {className: "by"}, songs.artist(song))];
    const right = value ? value(song, place) : clock(songs.data.seconds[song] ?? NaN);
    if (right) texts.push(element("span", {className: "value"}, right));
    const button = element("button", {type: "button", className: "song", title: `${title} – ${songs.about(song)}`}, ...texts);
    button.addEventListener("click", () => onPick(song, place));
    const row = element("li", {}, button);
    row.dataset.song = song;
    if (place === current) row.setAttribute("aria-current", "true");
    if (extra) {
      const [text, label, action] = extra;
      const more = element("button", {type: "button", "aria-label": label(title), title: label(title)}, text);
      more.addEventListener("click", () => action(song, place));
      row.append(more);
    }
    return row;
  };
  list.replaceChildren(...rows.slice(0, MOST).map(item));
}

/** Mark the rows of a song. */
export function mark(list, song) {
  for (const row of list.children) row.classList.toggle("chosen", Number(row.dataset.song) === song);
}
