/* The server's routes. A refused request throws an Error with the server's reason. */

async function answer(response) {
  if (response.ok) return response;
  const text = await response.text();
  let reason = text.trim();
  try {
    reason = JSON.parse(text).error ?? reason;
  } catch {
    // the security layer answers in plain text
  }
  throw new Error(reason || `the server answered ${response.status}`);
}

async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("the server does not answer: is the command still running?");
  }
  return answer(response);
}

const json = async (url) => (await ask(url)).json();

async function post(url, body) {
  const headers = {"content-type": "application/json"};
  return (await ask(url, {method: "POST", headers, body: JSON.stringify(body)})).json();
}

export const songs = () => json("/api/songs");
export const mapState = () => json("/api/map");
export const positions = async () => new Float32Array(await (await ask("/api/positions")).arrayBuffer());
export const clusters = () => json("/api/clusters");
export const nearest = (song, count = 25) => json(`/api/nearest/${song}?count=${count}`);
export const path = (start, end, count = 12) => json(`/api/path?start=${start}&end=${end}&count=${count}`);
export const radio = (start, seed, without, count = 20) => post("/api/radio", {start, seed, without, count});
export const explore = () => json("/api/explore");
export const rate = (song, rating) => post("/api/ratings", {song, rating});
export const playlists = () => json("/api/playlists");
export const playlist = (name) => json(`/api/playlists/${encodeURIComponent(name)}`);
export const save = (name, songs, replace) => post("/api/playlists", {name, songs, replace});
export const audioUrl = (song, asWav) => `/audio/${song}${asWav ? "?wav=1" : ""}`;
