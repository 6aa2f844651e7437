/* Saved playlists: the dialog that saves the queue, and the choice of one to open. */

import {playlist, playlists, save} from "./api.js";
import {at, attempt, element, tell} from "./page.js";

/** Fill the choice of playlists again. */
export async function refresh() {
  const {names} = await playlists();
  at("playlists").replaceChildren(element("option", {value: ""}, "open…"), ...names.map((name) => element("option", {value: name}, name)));
  at("playlists").disabled = !names.length;
}

/** player: whose queue is saved; onOpen(name, songs): a playlist was chosen. */
export function connect(player, onOpen) {
  const dialog = at("saving");
  at("save").addEventListener("click", () => {
    at("saving-error").textContent = "";
    at("replace-part").hidden = true;
    at("replace").checked = false;
    dialog.showModal();
    at("playlist-name").select();
  });
  at("cancel-saving").addEventListener("click", () => dialog.close());
  at("saving-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const {files} = await save(at("playlist-name").value.trim(), player.queue, at("replace").checked);
      dialog.close();
      tell(`Saved: ${files.join(", ")}`);
      await refresh();
    } catch (error) {
      at("saving-error").textContent = error.message;
      at("replace-part").hidden = false;
    }
  });
  at("playlists").addEventListener("change", () => attempt(async () => {
    const name = at("playlists").value;
    at("playlists").value = "";
    if (name) onOpen(name, (await playlist(name)).songs);
  }));
}
