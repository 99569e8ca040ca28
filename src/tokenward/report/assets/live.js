// Only in a served page: shows where the run is, and loads the page again when there is more to see.

const YOUNG = 10000, BUSY = 4000, PAUSE = 2000; // milliseconds
let touched = -BUSY;
for (const event of ["keydown", "pointerdown", "wheel"]) addEventListener(event, () => { touched = performance.now(); }, { passive: true });

async function askForNews() {
  try {
    const news = await (await fetch("news")).json(), now = document.getElementById("now");
    if (now && news.now) now.textContent = news.now;
    const idle = performance.now() > Math.max(YOUNG, touched + BUSY) && !document.querySelector("dialog[open]");
    // The address holds what the reader has chosen, so it is still there afterwards.
    if (idle && news.version !== document.documentElement.dataset.version) location.reload();
  } catch { /* the server has ended, or will be back */ }
  setTimeout(askForNews, PAUSE);
}

askForNews();
