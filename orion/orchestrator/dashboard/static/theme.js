// Sets the chosen theme before anything is painted. Without a choice the system's applies.
(function () {
  const chosen = localStorage.getItem("orion-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
