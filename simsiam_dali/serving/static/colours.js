/* What the points are coloured by: a category of ten, or a scale for ratings and years. */

import {at, element} from "./page.js";

// Nine steps of viridis (matplotlib), which grows evenly in lightness and is safe for the colour-blind.
const SCALE = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const DIMMED = 40;

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const SCALE_RGB = SCALE.map(channels);

function onScale(share) {
  const place = Math.max(0, Math.min(1, share)) * (SCALE.length - 1);
  const low = Math.min(SCALE.length - 2, Math.floor(place)), part = place - low;
  return [0, 1, 2].map((i) => Math.round(SCALE_RGB[low][i] * (1 - part) + SCALE_RGB[low + 1][i] * part));
}

const others = () => channels(getComputedStyle(document.documentElement).getPropertyValue("--others").trim());

/** The years that the scale ends with: one song in fifty may lie beyond each. */
function yearRange(years) {
  const known = years.filter((year) => year !== null).sort((a, b) => a - b);
  const place = (share) => known[Math.round(share * (known.length - 1))];
  return known.length ? [place(0.02), Math.max(place(0.98), place(0.02) + 1)] : [0, 1];
}

/** How songs are coloured: rgb(song), or null for "others"; entries for the legend; ends of a scale. */
function scheme(by, data) {
  if (by === "rating" || by === "year") {
    const values = data[by], [low, high] = by === "rating" ? [0, 1] : yearRange(data.year);
    const ends = by === "rating" ? ["0", "5"] : [`${low}`, `${high}`];
    const rgb = (song) => (values[song] === null ? null : onScale((values[song] - low) / (high - low)));
    return {rgb, ends, without: by === "rating" ? "unrated" : "year unknown"};
  }
  const {names, of} = data.kinds[by], palette = data.palette.map(channels);
  return {rgb: (song) => (of[song] < 0 ? null : palette[of[song]]), names, without: "others, or unknown"};
}

/** Uint8Array of the songs' colours; `lit`, a Set or null, dims all songs that are not in it. */
export function colours(by, data, lit = null) {
  const n = data.title.length, {rgb} = scheme(by, data), grey = others();
  const result = new Uint8Array(4 * n);
  for (let song = 0; song < n; song++) {
    const own = rgb(song);
    result.set(own ?? grey, 4 * song);
    result[4 * song + 3] = lit && !lit.has(song) ? DIMMED : own ? 225 : 165;
  }
  return result;
}

export function showLegend(by, data) {
  const {names, ends, without} = scheme(by, data), legend = at("legend");
  const entry = (colour, name) => {
    const dot = element("i");
    dot.style.background = colour;
    return element("li", {}, dot, element("span", {}, name.length > 34 ? `${name.slice(0, 33)}…` : name));
  };
  const rows = [element("li", {}, element("b", {}, by))];
  if (ends) {
    const steps = by === "rating" ? 5 : 4;
    for (let i = 0; i <= steps; i++) {
      const share = i / steps, value = Number(ends[0]) + share * (Number(ends[1]) - Number(ends[0]));
      rows.push(entry(`rgb(${onScale(share).join(" ")})`, `${Math.round(value)}`));
    }
  } else names.forEach((name, place) => rows.push(entry(data.palette[place], name)));
  rows.push(entry(`rgb(${others().join(" ")})`, without));
  legend.replaceChildren(...rows);
}
