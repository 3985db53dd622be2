// Before anything is drawn: light or dark as it was chosen here, or as the system has it.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("portcullis-theme");
  } catch {
    // storage is switched off; the system decides
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
