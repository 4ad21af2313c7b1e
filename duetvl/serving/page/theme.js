// Light or dark, before the first paint: this runs while the page is read, so nothing flashes.

(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function stored(value) {
    try {
      if (value === undefined) return localStorage.getItem("theme");
      if (value) localStorage.setItem("theme", value);
      else localStorage.removeItem("theme");
    } catch {
      // A browser that stores nothing: the choice lasts as long as the page.
    }
    return value;
  }

  const theme = stored();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;

  /** Switch between light and dark. Back at what the system has, the page follows the system again. */
  addEventListener("switch-theme", () => {
    const own = system.matches ? "dark" : "light";
    const next = (root.dataset.theme ?? own) === "dark" ? "light" : "dark";
    if (next === own) delete root.dataset.theme;
    else root.dataset.theme = next;
    stored(next === own ? null : next);
  });
})();
