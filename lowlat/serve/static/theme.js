// Light or dark, before anything is painted: a plain script in <head>, as modules run too late.
// Owns the stored choice "light", "dark" or "auto" (the system's), and data-theme on <html>.

(() => {
  const KEY = "lowlat-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      const choice = localStorage.getItem(KEY);
      return choice === "light" || choice === "dark" ? choice : "auto";
    } catch {
      return "auto"; // storage may be forbidden; the system's choice then holds
    }
  }

  let choice = stored();

  function apply() {
    const isDark = choice === "dark" || (choice === "auto" && system.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
  }

  system.addEventListener("change", apply);
  apply();

  window.lowlatTheme = {
    get choice() {
      return choice;
    },
    /** Light, dark, the system's, light again; returns what holds from here on. */
    next() {
      choice = { auto: "light", light: "dark", dark: "auto" }[choice];
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // the choice then lasts as long as the page
      }
      apply();
      return choice;
    },
  };
})();
