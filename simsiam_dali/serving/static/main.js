/* The page: reads the songs, and connects the map, the lists, the player and the ratings. */

import * as api from "./api.js";
import {colours, showLegend} from "./colours.js";
import * as keys from "./keys.js";
import {fill, mark, MOST} from "./lists.js";
import {SongMap} from "./map.js";
import {at, attempt, element, tell} from "./page.js";
import {Player} from "./player.js";
import * as playerbar from "./playerbar.js";
import {Rating} from "./rating.js";
import * as saving from "./saving.js";
import {Songs} from "./songs.js";

const COLOURS = ["genre", "artist", "folder", "decade", "year", "rating", "cluster"];
const POLL = 2000; // ms between two looks whether a better map is there

let songs, map, player, rating;
let selected = -1, pathFrom = -1, shown = [], lit = null, asked = 0;

/* The list, which shows what was asked for last. */

function show(name, note, rows, value) {
  shown = rows;
  at("list-name").textContent = name;
  at("list-note").textContent = rows.length > MOST ? `${note} The first ${MOST} are listed.`.trim() : note;
  fill(at("list"), songs, rows, {
    value,
    onPick: (song) => pick(song, false),
    extra: ["+", (title) => `Add ${title} to the queue`, (song) => player.add([song])],
  });
  mark(at("list"), selected);
  at("play-all").hidden = at("add-all").hidden = !rows.length;
}

/** Run a search of the server; an answer that another question has overtaken is dropped. */
function ask(name, question, then) {
  const own = ++asked;
  at("list-note").textContent = `${name}: searching…`;
  return attempt(async () => {
    try {
      const answer = await question();
      if (own === asked) then(answer);
    } catch (error) {
      if (own === asked) at("list-note").textContent = "";
      throw error;
    }
  });
}

function showNearest(song) {
  return ask("Nearest songs", () => api.nearest(song), ({songs: rows, similarity}) => {
    light(null);
    show("Nearest songs", `to ${songs.title(song)}; the number is the similarity.`, rows, (_, place) => similarity[place].toFixed(2));
    if (selected === song) map?.select(song, {kind: "star", songs: rows.slice(0, 12)});
  });
}

function showPath(start, end) {
  return ask("Path", () => api.path(start, end), ({songs: rows}) => {
    light(null);
    show("Path", `from ${songs.title(start)} to ${songs.title(end)}.`, rows);
    map?.select(selected, {kind: "way", songs: rows});
  });
}

function showExplore() {
  return ask("Songs to rate", api.explore, ({songs: rows}) => {
    light(new Set(rows));
    show("Songs to rate", "Their ratings would tell most about your taste.", rows);
  });
}

function search() {
  const text = at("search").value;
  asked++;
  if (!text.trim()) {
    light(null);
    show("Songs", "Click a song on the map, or search.", []);
    return;
  }
  const rows = songs.find(text);
  light(new Set(rows));
  show("Found", `${rows.length} songs.`, rows);
}

/* The map's colours. */

/** Dim all songs that are not in a Set; null dims none. */
function light(set) {
  if (lit === null && set === null) return;
  lit = set;
  recolour();
}

function recolour() {
  const by = at("colour").value;
  map?.setColours(colours(by, songs.data, lit));
  showLegend(by, songs.data);
}

async function colourBy() {
  if (at("colour").value === "cluster" && !songs.data.kinds.cluster) {
    const of = await api.clusters();
    const names = [...new Set(of)].sort((a, b) => a - b).map((number) => `cluster ${number + 1}`);
    songs.data.kinds.cluster = {of, names};
  }
  recolour();
}

/* One song is selected at a time: on the map, in the lists, and in its own part of the page. */

function select(song) {
  selected = song;
  at("selected").hidden = song < 0;
  at("song").textContent = songs.title(song);
  at("about").textContent = songs.about(song);
  rating.show(song);
  map?.select(song);
  map?.show(song);
  mark(at("list"), song);
  mark(at("queue"), song);
}

/** A song was chosen: it ends a path that was begun, else it plays. */
function pick(song, onMap) {
  if (pathFrom >= 0) {
    const start = pathFrom;
    endPath();
    select(song);
    showPath(start, song);
    return;
  }
  select(song);
  player.playNow(song);
  if (onMap) showNearest(song);
}

function beginPath() {
  pathFrom = selected;
  at("hint").textContent = "Choose the song where the path ends (Esc: no path)";
  at("hint").hidden = false;
}

function endPath() {
  pathFrom = -1;
  at("hint").hidden = true;
}

/* Queue and radio. */

function showQueue() {
  const {queue, place, isRadio} = player;
  at("queue-name").textContent = `${isRadio ? "Radio" : "Queue"} (${queue.length})`;
  // What has been played is folded away, but for the last song.
  const from = Math.max(0, place - 1);
  fill(at("queue"), songs, queue.slice(from), {
    onPick: (song, i) => { select(song); player.start(from + i); },
    extra: ["✕", (title) => `Remove ${title} from the queue`, (_, i) => player.remove(from + i)],
    current: place < 0 ? -1 : place - from,
  });
  at("queue").style.counterReset = `place ${from}`;
  mark(at("queue"), selected);
  at("save").hidden = at("clear").hidden = !queue.length;
}

function startRadio(song) {
  return attempt(async () => {
    const seed = Math.floor(Math.random() * 2 ** 32);
    const {songs: rows} = await api.radio(song, seed, [song]);
    player.play([song, ...rows], true);
    map?.select(song, {kind: "way", songs: [song, ...rows]});
  });
}

let heard = -1;

function playerChanged() {
  showQueue();
  const {song} = player;
  map?.setPlaying(song);
  if (song !== heard && song >= 0 && (selected < 0 || selected === heard)) select(song);
  heard = song;
}

/* Start. */

function connect() {
  at("search").addEventListener("input", search);
  at("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && shown.length) pick(shown[0], false);
  });
  at("colour").addEventListener("change", () => attempt(colourBy));
  at("whole").addEventListener("click", () => map?.whole());
  at("explore").addEventListener("click", showExplore);
  at("play").addEventListener("click", () => player.playNow(selected));
  at("add").addEventListener("click", () => player.add([selected]));
  at("nearest").addEventListener("click", () => showNearest(selected));
  at("path").addEventListener("click", beginPath);
  at("radio").addEventListener("click", () => startRadio(selected));
  at("play-all").addEventListener("click", () => player.play(shown));
  at("add-all").addEventListener("click", () => player.add(shown));
  at("clear").addEventListener("click", () => player.clear());
  const stars = Object.fromEntries([0, 1, 2, 3, 4, 5].map((n) => [`${n}`, () => rating.give(selected, n)]));
  keys.connect({
    ...stars,
    Delete: () => rating.give(selected, null),
    Escape: endPath,
    "/": () => at("search").focus(),
    " ": () => player.toggle(),
    n: () => player.step(1),
    p: () => player.step(-1),
  });
  for (const [query, action] of [["(prefers-color-scheme: dark)", recolour], ["(resolution: 1dppx)", () => map?.draw()]]) {
    matchMedia(query).addEventListener("change", action);
  }
}

/** Take the better map as soon as the server has made it. */
async function watchMap(version) {
  const state = await api.mapState();
  if (state.version !== version) map.setPositions(await api.positions());
  at("state").textContent = state.computing
    ? "Principal components; the better map by UMAP is being computed…"
    : {UMAP: "UMAP", PCA: "Principal components"}[state.kind];
  if (state.computing || state.kind !== "UMAP") setTimeout(() => watchMap(state.version).catch(() => {}), POLL);
}

async function start() {
  if (location.search) history.replaceState(null, "", "/"); // the token is in a cookie now
  const [data, positions, state] = await Promise.all([api.songs(), api.positions(), api.mapState()]);
  songs = new Songs(data);
  rating = new Rating(songs, () => { if (at("colour").value === "rating") recolour(); });
  player = new Player(at("audio"), async (last, queue) => (await api.radio(last, queue.length, queue)).songs);
  at("heading").textContent = document.title = `${songs.count.toLocaleString("en")} songs`;
  at("colour").replaceChildren(...COLOURS.map((by) => element("option", {value: by}, by)));
  at("colour").value = data.colour_by;
  try {
    map = new SongMap(at("stage"), {label: (song) => [songs.title(song), songs.artist(song)], onSelect: pick});
    map.setPositions(positions);
  } catch (error) {
    tell(error.message);
  }
  recolour();
  connect();
  playerbar.connect(player, songs, select);
  saving.connect(player, (name, rows) => show(name, `${rows.length} songs of this playlist.`, rows));
  player.addEventListener("change", playerChanged);
  player.addEventListener("problem", ({detail}) => tell(player.song < 0 ? detail : `${songs.title(player.song)}: ${detail}`));
  for (const id of ["search", "explore", "colour", "whole"]) at(id).disabled = false;
  map?.drawNow();
  performance.mark("ready");
  document.documentElement.dataset.ready = "true";
  at("state").textContent = "";
  await Promise.all([map && watchMap(state.version), saving.refresh()]);
}

start().catch((error) => {
  at("state").textContent = error.message;
});
