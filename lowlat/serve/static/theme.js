// Color theme: sets data-theme on <html> before the first paint, from the stored choice "light",
// "dark" or "auto" (the system's). A classic script in <head>, because modules run too late.

(() => {
  const KEY = "lowlat-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored() {
    try {
      const choice = localStorage.getItem(KEY);
      return choice === "light" || choice === "dark" ? choice : "auto";
    } catch {
      return "auto"; // storage may be disabled; use the system's theme
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
    /** Cycles light, dark, auto; returns the new choice. */
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
