/* The bar at the bottom: what plays, where in it, and the keys of the keyboard and of the system's media controls. */

import {at, clock, element} from "./page.js";

const PLAY = "M7 4v16l13-8z", PAUSE = "M6 4h4v16H6zM14 4h4v16h-4z";

/** songs: the library; onShow(song): the playing song's name was pressed. */
export function connect(player, songs, onShow) {
  const {audio} = player;
  at("pause").addEventListener("click", () => player.toggle());
  at("previous").addEventListener("click", () => player.step(-1));
  at("next").addEventListener("click", () => player.step(1));
  at("playing").addEventListener("click", () => onShow(player.song));
  at("seek").addEventListener("input", () => { audio.currentTime = at("seek").value; });
  at("volume").addEventListener("input", () => { audio.volume = at("volume").value; });

  player.addEventListener("change", () => {
    const song = player.song;
    at("previous").disabled = song < 0;
    at("next").disabled = player.place + 1 >= player.queue.length;
    at("pause").disabled = !player.queue.length;
    at("playing").disabled = at("seek").disabled = song < 0;
    if (song < 0) at("playing").textContent = "Nothing is playing";
    else at("playing").replaceChildren(element("b", {}, songs.title(song)), element("small", {}, songs.about(song)));
    document.title = song < 0 ? `${songs.count} songs` : `${songs.title(song)} – ${songs.artist(song)}`;
    tellSystem(player, songs);
  });
  player.addEventListener("time", () => {
    const known = Number.isFinite(audio.duration) ? audio.duration : songs.data.seconds[player.song] ?? 0;
    at("seek").max = known || 1;
    at("seek").value = audio.currentTime;
    at("seek").setAttribute("aria-valuetext", `${clock(audio.currentTime)} of ${clock(known)}`);
    at("elapsed").textContent = clock(audio.currentTime);
    at("length").textContent = clock(known);
    at("pause-icon").setAttribute("d", audio.paused ? PLAY : PAUSE);
    at("pause").setAttribute("aria-label", audio.paused ? "Play" : "Pause");
  });
}

/** The system's media keys and lock screen. */
function tellSystem(player, songs) {
  if (!("mediaSession" in navigator) || player.song < 0) return;
  const {title, artist, album} = songs.data, song = player.song;
  navigator.mediaSession.metadata = new MediaMetadata({title: title[song], artist: artist[song], album: album[song]});
  navigator.mediaSession.setActionHandler("nexttrack", () => player.step(1));
  navigator.mediaSession.setActionHandler("previoustrack", () => player.step(-1));
}
