// The keyboard, where no field has its own use for a key.

/** Listen for the keys that `#keys-dialog` lists. */
export function listenToKeys(page) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const done = handle(page, event);
    if (done) event.preventDefault();
  });
}

function handle(page, event) {
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (key === "escape") return escape(page);
  if (control && !event.shiftKey && key === "k") return findChat(page);
  if (control && event.shiftKey && key === "o") {
    page.newChat();
    return true;
  }
  if (control || event.altKey || event.target.closest("input, textarea, select")) return false;
  if (key === "?") document.getElementById("keys-dialog").showModal();
  else if (key === "/") page.composer.text.focus();
  else return false;
  return true;
}

function escape(page) {
  if (document.body.classList.contains("sidebar-open")) page.showSidebar(false);
  else if (page.answers.has(page.chat)) page.answers.stop(page.chat);
  else if (page.composer.editing) page.composer.cancelEdit();
  else document.activeElement.blur(); // so that / and ? reach the page
  return true;
}

function findChat(page) {
  page.showSidebar(true);
  page.sidebar.search.focus();
  page.sidebar.search.select();
  return true;
}
